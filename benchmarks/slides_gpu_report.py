"""The report of `benchmarks.slides_gpu`, as JSON and as a table."""

from benchmarks.gpu_watch import GpuUse
from benchmarks.harness import packages_text
from serve.contract.machine import Machine
from serve.contract.markdown import markdown_table
from serve.contract.strict import Strict


class Row(Strict):
    """One way to run tiles."""

    name: str
    parallel: int
    """Batches that the model runs at a time."""
    read_threads: int | None
    block_cells: int | None
    num_tiles: int
    """That the model ran, those in the overlap of two blocks twice."""
    num_tiles_once: int
    seconds: float
    tiles_per_second: float
    share: float | None
    """Of the tiles per second of the model alone, with as many batches at a time."""
    cpu_ms_per_tile: float
    """Processor time of this process, user and system."""
    waits: dict[str, float]
    """Seconds of the blending thread: waited for reading, the model and writing, or blended."""
    gpu: GpuUse | None


class SlidesGpuReport(Strict):
    """The content of `slides_gpu.json`."""

    machine: Machine
    packages: dict[str, str]
    model: str
    precision: str
    provider: str
    tile_size_px: int
    max_batch_size: int
    slide_px: int
    reader: str
    rows: tuple[Row, ...]
    peak_memory_gib: float
    """Largest resident set of this process."""


def markdown(report: SlidesGpuReport) -> str:
    """Write the report as a table."""
    gpus = ", ".join(f"{gpu.name} (driver {gpu.driver})" for gpu in report.machine.gpus) or "no GPU"
    rows = [
        (
            row.name,
            row.parallel,
            row.read_threads or "",
            row.block_cells or "",
            row.num_tiles,
            f"{row.tiles_per_second:.1f}",
            f"{row.num_tiles_once / row.seconds:.1f}",
            "" if row.share is None else f"{row.share:.0%}",
            "" if row.gpu is None else f"{row.gpu.busy:.0%}",
            "" if row.gpu is None else f"{row.gpu.peak_memory_gib:.1f} GiB",
            f"{row.cpu_ms_per_tile:.1f}",
            ", ".join(f"{name} {seconds:.1f}" for name, seconds in row.waits.items()),
        )
        for row in report.rows
    ]
    headers = (
        *("", "batches at a time", "readers", "block", "tiles", "tiles/s", "without halos"),
        *("of the model", "GPU busy", "GPU memory", "CPU ms/tile", "blending thread, s"),
    )
    return f"""# The slide engine on a GPU

{gpus}; {report.machine.processor.name}, {report.machine.num_cpus} CPUs; \
{packages_text(report.packages)}.
{report.model} in {report.precision} on {report.provider}, tiles of {report.tile_size_px} pixels, \
batches of {report.max_batch_size}; a slide of {report.slide_px} pixels a side, all tissue. This \
process took {report.peak_memory_gib:.1f} GiB. Written by `python -m benchmarks.slides_gpu`.

{markdown_table(headers, rows, align="lrrrrrrrrrrl")}
"""
