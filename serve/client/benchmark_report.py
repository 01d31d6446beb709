"""The benchmark's report as Markdown and as a plot."""

import io
from collections.abc import Sequence

from serve.client.benchmark import BenchmarkReport, Measurement
from serve.client.perf_analyzer import PerfAnalyzerRow


def markdown(report: BenchmarkReport) -> str:
    """The report as a page."""
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
        "| goal | limit | found | |",
        "| --- | ---: | ---: | --- |",
    ]
    for goal in report.goals:
        verdict = "met" if goal.is_met else "**missed**"
        lines.append(f"| {goal.text} | {goal.limit:.2f} | {goal.found:.2f} | {verdict} |")
    images = [one for one in report.measurements if one.unit == "image"]
    tiles = [one for one in report.measurements if one.unit == "tile"]
    lines += ["", "## Whole images", "", *_table(images, "images/s")]
    if tiles or report.perf_analyzer:
        lines += ["", "## Single tiles on Triton, all outputs", ""]
        lines += _table(tiles, "tiles/s", report.perf_analyzer)
    agreement = (f"{name} {share:.4%}" for name, share in report.label_agreement.items())
    lines += ["", f"Same labels as in this process: {', '.join(agreement)}.", ""]
    lines += [f"- {note}" for note in report.notes]
    return "\n".join(lines).rstrip() + "\n"


def _table(
    measurements: Sequence[Measurement], rate: str, others: Sequence[PerfAnalyzerRow] = ()
) -> list[str]:
    lines = [
        f"| route | clients | p50 ms | p95 ms | p99 ms | {rate} | requests |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows: list[tuple[int, str, str]] = []
    for one in measurements:
        latencies = " | ".join(_ms(value) for value in (one.p50_ms, one.p95_ms, one.p99_ms))
        numbers = f"{latencies} | {one.per_second:.2f}"
        rows.append((one.clients, one.route, f"{numbers} | {one.num_requests}"))
    for row in others:
        numbers = " | ".join(_ms(value) for value in (row.p50_ms, row.p95_ms, row.p99_ms))
        name = f"Triton {row.transport}, perf_analyzer"
        rows.append((row.concurrency, name, f"{numbers} | {row.inferences_per_second:.2f} | "))
    rows.sort(key=lambda row: row[0])  # stable: the routes keep their order
    return lines + [f"| {name} | {clients} | {numbers} |" for clients, name, numbers in rows]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def plot(report: BenchmarkReport) -> bytes | None:
    """Median latency and throughput over the clients, as a PNG; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
    except ModuleNotFoundError:
        return None
    figure = Figure(figsize=(9, 4), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    images = [one for one in report.measurements if one.unit == "image"]
    for name in dict.fromkeys(one.route for one in images):
        rows = [one for one in images if one.route == name]
        clients = [one.clients for one in rows]
        middle = [one.p50_ms for one in rows]
        spread = [(one.p95_ms or one.p50_ms) - one.p50_ms for one in rows]
        latency.errorbar(
            clients, middle, yerr=[[0.0] * len(rows), spread], marker="o", capsize=3, label=name
        )
        throughput.plot(clients, [one.per_second for one in rows], marker="o", label=name)
    for axes, title in (
        (latency, "ms: median, bar to p95 from 20 requests"),
        (throughput, "images a second"),
    ):
        axes.set_xscale("log", base=2)
        levels = sorted({one.clients for one in images})
        axes.set_xticks(levels, [str(level) for level in levels])
        axes.set_xlabel("clients at the same time")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
    latency.set_yscale("log")
    latency.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    latency.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    latency.yaxis.set_minor_locator(NullLocator())
    throughput.set_ylim(bottom=0)
    throughput.legend(fontsize="small")
    width, height = report.image_px
    figure.suptitle(
        f"{width} x {height} PNG, {report.num_tiles} tiles; {report.machine.processor}, "
        f"{report.machine.num_cpus} CPUs",
        fontsize="medium",
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
