"""Writes the report of the benchmark as Markdown."""

from collections.abc import Sequence

from serve.client.benchmark import BenchmarkReport, Measurement
from serve.contract.markdown import markdown_table


def markdown(report: BenchmarkReport) -> str:
    """Write the report as a page of Markdown."""
    machine = report.machine
    packages = ", ".join(f"{name} {number}" for name, number in machine.packages.items())
    width, height = report.image_px
    lines = [
        "# Latency and throughput of serving",
        "",
        f"{machine.processor}, {machine.num_cpus} CPUs, {machine.system}; Python {machine.python}, "
        f"{packages}. Load before and after: {machine.load_average[0]:.1f} and "
        f"{machine.load_average[1]:.1f}.",
        f"Model {report.model} on {report.backend}; a {width} x {height} PNG of "
        f"{report.png_bytes / 1e6:.1f} MB, {report.num_tiles} tiles. {report.num_rounds} rounds in "
        "which the routes take turns; the clients run on the same machine. Written by "
        "`python -m serve benchmark`.",
        "",
        "## Goals",
        "",
        *_goals(report),
    ]
    images = [one for one in report.measurements if one.unit == "image"]
    tiles = [one for one in report.measurements if one.unit == "tile"]
    lines += ["", "## Whole images", "", *_table(images, "images/s")]
    if tiles:
        lines += ["", "## Single tiles on Triton, all outputs", ""]
        lines += _table(tiles, "tiles/s")
    agreement = (f"{name} {share:.4%}" for name, share in report.label_agreement.items())
    lines += ["", f"Same labels as in this process: {', '.join(agreement)}.", ""]
    lines += [f"- {note}" for note in report.notes]
    return "\n".join(lines).rstrip() + "\n"


def _goals(report: BenchmarkReport) -> list[str]:
    rows = [
        [
            goal.text,
            f"{goal.limit:.2f}",
            f"{goal.found:.2f}",
            "met" if goal.is_met else "**missed**",
        ]
        for goal in report.goals
    ]
    return markdown_table(["goal", "limit", "found", ""], rows, align="lrrl").splitlines()


def _table(measurements: Sequence[Measurement], rate: str) -> list[str]:
    rows = [
        [
            one.route,
            one.clients,
            *(_ms(value) for value in (one.p50_ms, one.p95_ms, one.p99_ms)),
            f"{one.per_second:.2f}",
            one.num_requests,
        ]
        for one in sorted(measurements, key=lambda one: one.clients)  # the routes keep their order
    ]
    headers = ["route", "clients", "p50 ms", "p95 ms", "p99 ms", rate, "requests"]
    return markdown_table(headers, rows, align="lr").splitlines()


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
