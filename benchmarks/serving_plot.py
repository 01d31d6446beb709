"""Plots the benchmark of serving."""

import io

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from serve.client.benchmark import BenchmarkReport


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
