"""`make benchmark`: the benchmark of serving, with the tests' Triton and its perf_analyzer.

Takes the arguments of `python -m serve benchmark`. If Triton or perf_analyzer cannot be installed
or started, the rest is measured, and the report says what was left out.
"""

import io
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import get_args

import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from benchmarks.harness import one_line_errors, write_report
from benchmarks.perf_analyzer import PerfAnalyzerRow, Transport, run_perf_analyzer
from export import errors as export_errors
from export.triton import publish
from serve.client.benchmark import BenchmarkReport
from serve.client.benchmark_report import markdown
from serve.client.benchmark_run import Benchmark, run_benchmark
from serve.contract import errors as serve_errors
from serve.contract.manifest import read_bundle
from serve.contract.markdown import markdown_table
from tests.support.triton_server import TritonServer, TritonSetupError, install_triton, pip

CLIENT_PACKAGE = "tritonclient==2.51.0"  # later ones need glibc 2.38
NOTE = (
    "Triton is the real server, 2.51, but with the tests' Python stand-in for its ONNX Runtime "
    "backend. Its rows compare the transports, and say nothing about the speed of Triton's own C++ "
    "backend."
)
_LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}


def install_perf_analyzer() -> Path:
    """Install perf_analyzer; returns a script that runs it with the tests' Triton libraries."""
    server = install_triton()
    folder = server.parent / CLIENT_PACKAGE.replace("==", "-")
    script = folder / "perf_analyzer.sh"
    if script.is_file():
        return script
    with tempfile.TemporaryDirectory(dir=server.parent, prefix=".perf-") as name:
        building = Path(name) / "built"
        building.mkdir()
        pip("download", "--no-deps", "--dest", name, CLIENT_PACKAGE)
        (wheel,) = Path(name).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (one for one in archive.namelist() if one.endswith("/bin/perf_analyzer"))
            (building / "perf_analyzer").write_bytes(archive.read(member))
        for link, pattern in _LIBRARIES.items():
            (library,) = (server / "package" / "nvidia_pytriton.libs").glob(pattern)
            (building / link).symlink_to(library)
        (building / "perf_analyzer").chmod(0o755)
        (building / script.name).write_text(
            f'#!/bin/sh\nLD_LIBRARY_PATH={folder} exec {folder}/perf_analyzer "$@"\n'
        )
        (building / script.name).chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
    return script


@one_line_errors()
def main(arguments: Sequence[str]) -> int:
    """Run the benchmark with as much of Triton as can be installed."""
    command = tyro.cli(Benchmark, args=list(arguments), prog="python -m benchmarks.serving")
    notes: list[str] = []
    analyzer: Path | None = None
    with ExitStack() as stack:
        repository = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="focalpath-")))
        try:
            publish(command.settings.bundle, repository)
            server = stack.enter_context(TritonServer(repository))
            settings = command.settings.model_copy(update={"triton_url": server.grpc_url})
            command = replace(command, settings=settings, triton_http_url=server.http_url)
            notes.append(NOTE)
            analyzer = install_perf_analyzer()
        except (TritonSetupError, export_errors.FocalPathError, OSError, ValueError) as error:
            notes.append(f"Not all of Triton could be measured: {error}")
        try:
            report = run_benchmark(command)
        except serve_errors.FocalPathError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        rows = _analyzed(analyzer, command, notes) if analyzer is not None else []
    notes = [*report.notes, *notes]
    whole = ServingReport(
        **{**report.model_dump(), "notes": tuple(notes)}, perf_analyzer=tuple(rows)
    )
    write_report(command.out, "benchmark", whole, as_markdown(whole))
    (command.out / "benchmark.png").write_bytes(plot(whole))
    return 0


class ServingReport(BenchmarkReport):
    """The report of `python -m serve benchmark`, with what perf_analyzer measured beside it."""

    perf_analyzer: tuple[PerfAnalyzerRow, ...]


def as_markdown(report: ServingReport) -> str:
    """Write the report as a page of Markdown."""
    text = markdown(report)
    if not report.perf_analyzer:
        return text
    rows = [
        (
            row.transport,
            row.concurrency,
            *(f"{value:.1f}" for value in (row.p50_ms, row.p95_ms, row.p99_ms)),
            f"{row.inferences_per_second:.2f}",
        )
        for row in report.perf_analyzer
    ]
    headers = ("transport", "clients", "p50 ms", "p95 ms", "p99 ms", "tiles/s")
    table = markdown_table(headers, rows, align="lrrrrr")
    return f"{text}\n## Single tiles on Triton, by perf_analyzer\n\n{table}\n"


def plot(report: BenchmarkReport) -> bytes:
    """Plot median latency and throughput against the number of clients, as a PNG."""
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
        (throughput, "images per second"),
    ):
        axes.set_xscale("log", base=2)
        levels = sorted({one.clients for one in images})
        axes.set_xticks(levels, [str(level) for level in levels])
        axes.set_xlabel("concurrent clients")
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


def _analyzed(program: Path, command: Benchmark, notes: list[str]) -> list[PerfAnalyzerRow]:
    """Measure each transport with perf_analyzer; adds a note for one that fails."""
    rows: list[PerfAnalyzerRow] = []
    manifest = read_bundle(command.settings.bundle)
    urls = {"HTTP": command.triton_http_url or ""}
    for transport in get_args(Transport):
        url = urls.get(transport, command.settings.triton_url)
        try:
            rows += run_perf_analyzer(
                program, manifest, transport=transport, url=url, levels=command.clients
            )
        except serve_errors.BackendUnavailableError as error:
            notes.append(f"perf_analyzer over {transport} was left out: {error}")
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
