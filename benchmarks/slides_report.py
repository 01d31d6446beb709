"""What `benchmarks.slides` measures, and the table of it."""

from pydantic import Field
from rich.console import Console
from rich.table import Table

from benchmarks.seams import Seams
from serve.contract.machine import Machine
from serve.contract.strict import Strict


class Rates(Strict):
    """The speed of one variant."""

    seconds: tuple[float, ...]
    """One value per round."""
    num_tiles: int
    tiles_per_second: float
    """Median over the rounds."""


class SlidesReport(Strict):
    """The content of `slides.json`."""

    machine: Machine
    packages: dict[str, str]
    model: str
    tile_size_px: int
    slide_px: tuple[int, int]
    model_alone: Rates
    engine: Rates
    direct: Rates
    engine_share: float = Field(description="the engine's tiles per second divided by the model's")
    merging: float = Field(
        description="merging and writing: how much longer the command takes than planning, reading "
        "and the model without them, by the wall clock, divided by the latter"
    )
    merging_larger: float = Field(description="the same of a slide of four times the area")
    beyond_inference: float = Field(
        description="how much longer the command takes than the model alone, by the wall clock, "
        "divided by the latter"
    )
    beyond_inference_parts: dict[str, float] = Field(
        description="where these seconds are: `planning`, before the first tile is read; `tiles`, "
        "while tiles are read, computed, blended and written; `outputs`, after the last of them"
    )
    beyond_inference_larger: float = Field(description="the same of a slide of four times the area")
    beyond_inference_several: float = Field(
        description="the same of three such slides in one command"
    )
    beyond_inference_cpu: dict[str, float] = Field(
        description="CPU time of the command with recorded answers, divided by that of the model "
        "alone: `planning`; `blocks`, which are read, blended and written; `outputs`, the default "
        "formats; `all_outputs`, every format"
    )
    twice_the_area: float = Field(
        description="time for twice the area, divided by the time for the slide"
    )
    speedup: float = Field(
        description="the direct loop's time divided by the command's, with outputs"
    )
    same_labels: float = Field(
        description="share of the tissue's cells with the same label as the direct loop"
    )
    memory: dict[str, float] | None
    """Of `benchmarks.slides_memory`: seconds, tiles, GiB."""
    seams: tuple[Seams, ...]


def print_report(report: SlidesReport, console: Console) -> None:
    """Print the figures beside their expected values."""
    table = Table(box=None, pad_edge=False)
    for name in ("figure", "measured", "expected"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    table.add_row("tiles per second by the model alone", f"{report.engine_share:.0%}", ">= 90%")
    table.add_row("wall clock: merging and writing", f"{report.merging:.1%}", "<= 10%")
    table.add_row("the same of four times the area", f"{report.merging_larger:.1%}", "<= 10%")
    table.add_row("wall clock: longer than the model alone", f"{report.beyond_inference:.1%}", "")
    for part, value in report.beyond_inference_parts.items():
        table.add_row(f"   of it {part}", f"{value:.1%}", "")
    larger, several = report.beyond_inference_larger, report.beyond_inference_several
    table.add_row("the same of four times the area", f"{larger:.1%}", "")
    table.add_row("the same of three slides in one command", f"{several:.1%}", "")
    cpu = report.beyond_inference_cpu
    merging = f"{cpu['blocks'] + cpu['outputs']:.1%}"
    table.add_row("CPU time beside the model, to the model's", merging, "<= 10%")
    every = f"{cpu['blocks'] + cpu['all_outputs']:.1%}"
    table.add_row("the same with every format", every, "")
    table.add_row("time of twice the area", f"{report.twice_the_area:.2f}", "<= 2.1")
    table.add_row("speed-up over the direct loop", f"{report.speedup:.1f} x", ">= 3 x")
    table.add_row(
        "same labels as the direct loop, on tissue", f"{report.same_labels:.2%}", ">= 99.5%"
    )
    if report.memory is not None:
        peak = f"{report.memory['peak_gib']:.2f} GiB"
        table.add_row("memory of the generated slide", peak, "<= 3.7 GiB")
    for seams in report.seams:
        name = f"label changes at seams, overlap {seams.overlap:.1%}"
        table.add_row(name, f"{seams.ratio:.2f}", "<= 1.05")
    console.print(table)
