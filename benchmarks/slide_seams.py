"""Measures the seams between tiles, for several overlaps: `python -m benchmarks.slide_seams`.

An image is segmented several times, each time with its tiles elsewhere, so that each place is
compared with itself: in one grid a line of tiles runs there, in the others none does.

- How often neighbouring cells have different labels across a line, divided by how often they have
  at the same places without a line. 1 means that there is no seam.
- How often a cell's label is not that of most other grids, by the distance to the nearest line.

The grids are moved by whole patches of the encoder, whose edges show in every answer.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.harness import write_report
from benchmarks.real_size_model import draw_tiles
from benchmarks.seams import Seams, measure_seams
from serve.contract.machine import Machine, this_machine
from serve.contract.manifest import Manifest, read_bundle
from serve.contract.strict import Strict
from serve.images.readers.registry import open_reader
from serve.images.tiles import SAME_MPP
from serve.inference.segmenter import open_segmenter
from serve.settings import InferenceSettings


class SeamsReport(Strict):
    """The content of `slide_seams.json`."""

    machine: Machine
    model: str
    tile_size_px: int
    images: tuple[str, ...]
    seams: tuple[Seams, ...]


@dataclass(frozen=True, kw_only=True)
class SeamsBenchmark:
    """Measure the seams of a model for several overlaps."""

    settings: tyro.conf.OmitArgPrefixes[InferenceSettings]
    """What runs the model."""
    images: tuple[Path, ...] = ()
    """Small slides or pictures that state their um per pixel, of at least five tiles a side; by
    default synthetic ones."""
    num_drawn: int = 4
    """Synthetic images."""
    drawn_px: int = 1600
    """Their side."""
    overlaps: tuple[float, ...] = (0.5, 0.25, 0.1875, 0.125, 0.0625, 0.0)
    out: Path = Path("artifacts/results/slides")
    """Folder for `slide_seams.json`."""


def run_benchmark(command: SeamsBenchmark) -> SeamsReport:
    """Measure all overlaps."""
    manifest = read_bundle(command.settings.bundle)
    images = [_whole(path, manifest) for path in command.images]
    names = [path.name for path in command.images]
    if not images:
        images = [*draw_tiles(command.num_drawn, command.drawn_px)]
        names = [f"{command.num_drawn} synthetic, {command.drawn_px} px"]
    segmenter = open_segmenter(command.settings, manifest)
    try:
        seams = measure_seams(images, segmenter.backend, manifest, command.overlaps)
    finally:
        segmenter.close()
    return SeamsReport(
        machine=this_machine(),
        model=f"{manifest.name} {manifest.version}",
        tile_size_px=manifest.tile_size_px,
        images=tuple(names),
        seams=tuple(seams),
    )


def _whole(path: Path, manifest: Manifest) -> NDArray[np.uint8]:
    """A small slide or picture at the model's um per pixel."""
    assert manifest.mpp is not None
    with open_reader(path) as reader:
        view = reader.at_mpp(manifest.mpp, tolerance=SAME_MPP)
        return view.read(0, 0, view.height_px, view.width_px)


def print_report(report: SeamsReport, console: Console) -> None:
    """Print a row per overlap."""
    table = Table(box=None, pad_edge=False)
    for name in ("overlap", "compute", "changes at lines", *report.seams[0].unlike_others):
        table.add_column(name, justify="right")
    for seams in report.seams:
        kinds = " ".join(f"{kind} {ratio:.2f}" for kind, ratio in seams.changes.items())
        table.add_row(
            f"{seams.overlap:.2%}",
            f"{seams.tiles_per_area:.2f}",
            kinds,
            *(f"{share:.2%}" for share in seams.unlike_others.values()),
        )
    console.print(table)


def main() -> None:
    """Run the command line."""
    command = tyro.cli(SeamsBenchmark, description=__doc__)
    console = Console()
    report = run_benchmark(command)
    print_report(report, console)
    write_report(command.out, "slide_seams", report)


if __name__ == "__main__":
    main()
