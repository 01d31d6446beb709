"""Measures the speed and the memory of segmenting whole slides: `make benchmark-slides`.

The variants take turns in one process, with one model and the same threads, on a generated slide:
synthetic tissue on a third of it, glass around. Numbers are medians over the rounds.

- `model`: the model alone, on tiles in memory, with as many inferences at a time as the engine.
- `engine`: the whole command; its rate counts tiles while blocks are computed. What it takes longer
  than the model alone, by the wall clock, is all that lies beyond inference. Stages that run beside
  the model, on a core that would wait otherwise, add nothing to it.
- `inference`: planning, reading and the model, as the engine runs them, with nothing blended or
  written. What the whole command takes longer is merging and writing.
- `several`: the whole command on three slides.
- `repeated`: the whole command with recorded answers of the model: what all else takes.
- `direct`: a simple loop: OpenSlide, one tile after another over the whole slide, ONNX Runtime on
  all cores, and a float32 canvas.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np
import tyro
import zarr
from rich.console import Console

from benchmarks.generated_slide import SlideOptions, tiles_in_memory, write_slide
from benchmarks.harness import one_line_errors, write_report
from benchmarks.real_size_model import draw_tiles
from benchmarks.seams import measure_seams
from benchmarks.slides_report import Rates, SlidesReport, print_report
from benchmarks.slides_variants import Run, Variants
from serve.contract.machine import installed_versions, this_machine
from serve.slides.outputs.registry import DEFAULT, FORMATS
from serve.slides.store import LABELS, array_of

_PACKAGES = ("onnxruntime", "openslide-bin", "tifffile", "imagecodecs", "zarr", "numpy")
_NUM_SEVERAL = 3
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SlidesBenchmark(SlideOptions):
    """Measure the slide engine."""

    rounds: int = 3
    memory_px: tuple[int, int] = (100_000, 150_000)
    """Width and height of the slide for the memory; 0 0 leaves it out."""
    overlaps: tuple[float, ...] = (0.25, 0.125)
    """Overlaps whose seams are measured; none leaves them out."""


@dataclass(frozen=True)
class _Round:
    """One turn of every variant."""

    run: Run
    repeated: Run
    all_formats: Run
    double: Run
    """Of a slide of twice the area."""
    merging: float
    """How much longer the command takes than reading and the model, as a share."""
    merging_larger: float
    """The same of a slide of four times the area."""
    beyond_larger: float
    """How much longer that slide takes than the model alone."""
    beyond_several: float
    """The same of several slides in one command."""
    alone_s: float
    alone_cpu_s: float
    direct_s: float
    num_direct: int
    same_labels: float
    """Share of the tissue's cells with the label of the simple loop."""

    def __str__(self) -> str:
        beyond = self.run.total / self.alone_s - 1
        return (
            f"model {self.alone_s:.1f} s, engine {self.run.computing:.1f} of {self.run.total:.1f} "
            f"s ({beyond:+.1%}, merging and writing {self.merging:+.1%}), twice the area "
            f"{self.double.total:.1f} s, four times {self.beyond_larger:+.1%} "
            f"({self.merging_larger:+.1%}), {_NUM_SEVERAL} slides {self.beyond_several:+.1%}, "
            f"direct {self.direct_s:.1f} s"
        )


class _Slides:
    """The slides that are measured, and tiles of one in memory."""

    def __init__(self, folder: Path, command: SlidesBenchmark, mpp: float, tile_px: int) -> None:
        side = command.side_px
        self.one, self.two, self.four = (folder / f"{name}.svs" for name in ("one", "two", "four"))
        write_slide(self.one, side, side, mpp, command.drawn_px)
        write_slide(self.two, side, 2 * side, mpp, command.drawn_px)
        write_slide(self.four, 2 * side, 2 * side, mpp, command.drawn_px)
        self.several = [folder / f"several{number}.svs" for number in range(_NUM_SEVERAL)]
        for path in self.several:
            path.hardlink_to(self.one)
        self.tiles = tiles_in_memory(self.one, tile_px)


def _one_round(bench: Variants, slides: _Slides, num_tiles: int) -> _Round:
    one = slides.one
    alone = [bench.model_alone(slides.tiles, num_tiles)]

    def beside(measure: Callable[[], T]) -> tuple[T, float]:
        """Measure, and the model alone before and after: a machine's speed drifts."""
        found = measure()
        alone.append(bench.model_alone(slides.tiles, num_tiles))
        return found, (alone[-2][0] + alone[-1][0]) / 2

    run, alone_s = beside(lambda: bench.command(one))
    several_s, alone_by_several_s = beside(lambda: bench.several(slides.several))
    four, alone_by_four_s = beside(lambda: bench.command(slides.four))
    double = bench.command(slides.two)
    repeated = bench.repeated(one, DEFAULT)
    all_formats = bench.repeated(one, tuple(FORMATS))
    direct_s, num_direct, labels = bench.direct(one)
    ours = np.asarray(array_of(zarr.open_group(run.store, mode="r"), LABELS)[:])
    same = (labels[: ours.shape[0], : ours.shape[1]] == ours)[ours > 0]
    return _Round(
        run=run,
        repeated=repeated,
        all_formats=all_formats,
        double=double,
        merging=_merging(bench, one),
        merging_larger=_merging(bench, slides.four),
        beyond_larger=four.total / (alone_by_four_s * four.num_tiles / num_tiles) - 1,
        beyond_several=several_s / (alone_by_several_s * _NUM_SEVERAL) - 1,
        alone_s=alone_s,
        alone_cpu_s=median(cpu_s for _, cpu_s in alone),
        direct_s=direct_s,
        num_direct=num_direct,
        same_labels=float(same.mean()),
    )


def _merging(bench: Variants, slide: Path) -> float:
    """How much longer the command takes than planning, reading and the model before and after."""
    before, run, after = bench.inference(slide), bench.command(slide), bench.inference(slide)
    return 2 * run.total / (before + after) - 1


def run_benchmark(command: SlidesBenchmark, console: Console) -> SlidesReport:
    """Measure all variants in turns."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Variants(command.settings, Path(folder))
        mpp = bench.manifest.mpp
        assert mpp is not None
        slides = _Slides(Path(folder), command, mpp, bench.manifest.tile_size_px)
        num_tiles = bench.command(slides.one).num_tiles  # and what is slow for the first time
        rounds = []
        for number in range(command.rounds):
            rounds.append(_one_round(bench, slides, num_tiles))
            console.print(f"round {number + 1}: {rounds[-1]}")
        report = _report(bench, command, rounds)
        bench.close()
    return report


def _report(bench: Variants, command: SlidesBenchmark, rounds: Sequence[_Round]) -> SlidesReport:
    manifest, num_tiles = bench.manifest, rounds[0].run.num_tiles
    seams = (
        measure_seams([*draw_tiles(2, 2048)], bench.runner, manifest, command.overlaps)
        if command.overlaps
        else []
    )
    return SlidesReport(
        machine=this_machine(),
        packages=installed_versions(_PACKAGES),
        model=f"{manifest.name} {manifest.version}",
        tile_size_px=manifest.tile_size_px,
        slide_px=(command.side_px, command.side_px),
        model_alone=_rates([r.alone_s for r in rounds], num_tiles),
        engine=_rates([r.run.computing for r in rounds], num_tiles),
        direct=_rates([r.direct_s for r in rounds], rounds[-1].num_direct),
        engine_share=median(r.alone_s / r.run.computing for r in rounds),
        merging=median(r.merging for r in rounds),
        merging_larger=median(r.merging_larger for r in rounds),
        beyond_inference=median(r.run.total / r.alone_s - 1 for r in rounds),
        beyond_inference_parts={
            "planning": median(r.run.planning / r.alone_s for r in rounds),
            "tiles": median(r.run.computing / r.alone_s - 1 for r in rounds),
            "outputs": median(r.run.outputs / r.alone_s for r in rounds),
        },
        beyond_inference_larger=median(r.beyond_larger for r in rounds),
        beyond_inference_several=median(r.beyond_several for r in rounds),
        beyond_inference_cpu={  # CPU seconds beside the model, divided by the model's
            "planning": median(r.repeated.planning / r.alone_cpu_s for r in rounds),
            "blocks": median(r.repeated.computing / r.alone_cpu_s for r in rounds),
            "outputs": median(r.repeated.outputs / r.alone_cpu_s for r in rounds),
            "all_outputs": median(r.all_formats.outputs / r.alone_cpu_s for r in rounds),
        },
        twice_the_area=median(r.double.total / r.run.total for r in rounds),
        speedup=median(r.direct_s / r.run.total for r in rounds),
        same_labels=median(r.same_labels for r in rounds),
        memory=_memory(command.memory_px),
        seams=tuple(seams),
    )


def _rates(seconds: Sequence[float], num_tiles: int) -> Rates:
    return Rates(
        seconds=tuple(round(value, 3) for value in seconds),
        num_tiles=num_tiles,
        tiles_per_second=num_tiles / median(seconds),
    )


def _memory(size: tuple[int, int]) -> dict[str, float] | None:
    """Run `benchmarks.slides_memory` in another process."""
    if size == (0, 0):
        return None
    command = [sys.executable, "-m", "benchmarks.slides_memory"]
    command += ["--width", str(size[0]), "--height", str(size[1])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@one_line_errors()
def main() -> None:
    """Run the command line."""
    command = tyro.cli(SlidesBenchmark, description=__doc__)
    console = Console()
    report = run_benchmark(command, console)
    print_report(report, console)
    write_report(command.out, "slides", report)
    console.print(f"written to {command.out / 'slides.json'}")


if __name__ == "__main__":
    main()
