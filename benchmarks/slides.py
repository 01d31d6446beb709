"""Measures the speed and the memory of segmenting whole slides: `make benchmark-slides`.

The variants take turns in one process, with one model and the same threads, on a generated slide:
synthetic tissue on a third of it, glass around. Numbers are medians over the rounds.

- `model`: the model alone, on tiles in memory, with as many inferences at a time as the engine.
- `engine`: the whole command; its rate counts tiles while blocks are computed.
- `repeated`: the whole command with recorded answers of the model: what all else takes.
- `direct`: a simple loop: OpenSlide, one tile after another over the whole slide, ONNX Runtime on
  all cores, and a float32 canvas.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import openslide
import tyro
import zarr
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.generated_slide import Clock, SlideOptions, tiles_in_memory, write_slide
from benchmarks.harness import one_line_errors
from benchmarks.real_size_model import draw_tiles
from benchmarks.recorded_model import RecordedModel
from benchmarks.slide_seams import measure_seams
from benchmarks.slides_report import Rates, SlidesReport, print_report
from serve.contract.machine import installed_versions, this_machine
from serve.contract.manifest import LOW_RES_STRIDE, Manifest, read_bundle
from serve.images.tiles import gaussian_window, tile_origins
from serve.inference.batching import TileAnswer, TileRunner
from serve.inference.segmenter import open_segmenter
from serve.settings import InferenceSettings
from serve.slides.cohort import SlideTask
from serve.slides.finish import read_passport
from serve.slides.local import LocalEngine, model_of
from serve.slides.options import RunOptions
from serve.slides.outputs.registry import DEFAULT, FORMATS, formats_of
from serve.slides.run import Cohort, run_cohort
from serve.slides.store import LABELS, array_of
from serve.slides.throughput import for_throughput

_OUTPUT = "low_res_probabilities"
_PACKAGES = ("onnxruntime", "openslide-bin", "tifffile", "imagecodecs", "zarr", "numpy")


@dataclass(frozen=True, kw_only=True)
class SlidesBenchmark(SlideOptions):
    """Measure the slide engine."""

    rounds: int = 3
    memory_px: tuple[int, int] = (100_000, 150_000)
    """Width and height of the slide for the memory; 0 0 leaves it out."""
    overlaps: tuple[float, ...] = (0.25, 0.125)
    """Overlaps whose seams are measured; none leaves them out."""


class _Bench:
    """The open model, and the variants that run with it."""

    def __init__(self, settings: InferenceSettings, folder: Path) -> None:
        self.manifest: Manifest = read_bundle(settings.bundle)
        own = for_throughput(settings, self.manifest)
        segmenter = open_segmenter(own, self.manifest)
        self.runner: TileRunner = segmenter.backend
        self._simple: TileRunner = open_segmenter(settings, self.manifest).backend
        self._model = model_of(segmenter)
        self._folder = folder
        self._runs = 0
        self._recorded: dict[Path, RecordedModel] = {}
        self.batch = (own.max_batch_size or self.manifest.max_batch_size) * own.parallel_batches

    def model_alone(self, tiles: NDArray[np.uint8], count: int) -> tuple[float, float]:
        """Seconds and CPU seconds for `count` tiles in memory."""
        pending: deque[Future[TileAnswer]] = deque()
        started, cpu = time.perf_counter(), time.process_time()
        for index in range(count):
            if len(pending) >= 2 * self.batch:
                pending.popleft().result()
            pending.append(self.runner.submit(tiles[index % len(tiles)], (_OUTPUT,)))
        for future in pending:
            future.result()
        return time.perf_counter() - started, time.process_time() - cpu

    def command(self, slide: Path) -> "_Run":
        """Run the whole command on a slide."""
        return self._run(slide, self.runner, DEFAULT, time.perf_counter)

    def repeated(self, slide: Path, formats: Sequence[str]) -> "_Run":
        """CPU seconds of the whole command on a slide with recorded answers."""
        if slide not in self._recorded:
            self._recorded[slide] = RecordedModel(self.runner)
            self._run(slide, self._recorded[slide], tuple(FORMATS), time.process_time)
        self._recorded[slide].rewind()
        return self._run(slide, self._recorded[slide], formats, time.process_time)

    def _run(
        self,
        slide: Path,
        runner: TileRunner,
        formats: Sequence[str],
        now: Callable[[], float],
    ) -> "_Run":
        self._runs += 1
        out = self._folder / f"out{self._runs}"
        engine = LocalEngine(runner, self._model, max_batch_size=self.batch)
        clock = Clock(now)
        cohort = Cohort(out, engine, RunOptions(), formats_of(formats), clock)
        started = now()
        (outcome,) = run_cohort(cohort, [SlideTask(path=slide, name=slide.stem)])
        ended = now()
        assert outcome.status == "done", outcome.reason
        passport = read_passport(out / slide.stem)
        assert passport is not None
        return _Run(
            total=ended - started,
            planning=clock.began - started,
            computing=clock.computed - clock.began,
            outputs=ended - clock.computed,
            num_tiles=outcome.num_tiles,
            beyond=sum(
                value
                for name, value in passport.seconds.items()
                if name in ("blend", "write") or name.startswith("output")
            ),
            store=out / slide.stem / f"{slide.stem}.ome.zarr",
        )

    def close(self) -> None:
        """Close the model."""
        self.runner.close()
        self._simple.close()

    def direct(self, slide: Path) -> tuple[float, int, NDArray[np.uint8]]:
        """Run the simple loop; returns seconds, the number of tiles, and labels (h, w) uint8."""
        started = time.perf_counter()
        tile = self.manifest.tile_size_px
        side = tile // LOW_RES_STRIDE
        window = gaussian_window(side)
        opened = openslide.OpenSlide(slide)
        width, height = opened.dimensions
        canvas = np.zeros(
            (len(self.manifest.classes), height // LOW_RES_STRIDE, width // LOW_RES_STRIDE),
            np.float32,
        )
        weights = np.zeros(canvas.shape[1:], np.float32)
        num_tiles = 0
        for y in tile_origins(height, tile):
            for x in tile_origins(width, tile):
                region = np.asarray(opened.read_region((x, y), 0, (tile, tile)).convert("RGB"))
                answer = self._simple.infer(region[None], (_OUTPUT,))[_OUTPUT][0]
                place = (
                    slice(y // LOW_RES_STRIDE, y // LOW_RES_STRIDE + side),
                    slice(x // LOW_RES_STRIDE, x // LOW_RES_STRIDE + side),
                )
                canvas[:, *place] += window * answer
                weights[place] += window
                num_tiles += 1
        labels = ((canvas / weights).argmax(axis=0) + 1).astype(np.uint8)
        opened.close()
        return time.perf_counter() - started, num_tiles, labels


@dataclass(frozen=True)
class _Run:
    """In seconds, wall-clock or CPU."""

    total: float
    planning: float
    computing: float
    outputs: float
    num_tiles: int
    beyond: float
    store: Path


@dataclass(frozen=True)
class _Round:
    """One turn of every variant."""

    run: _Run
    repeated: _Run
    all_formats: _Run
    double: _Run
    """Of a slide of twice the area."""
    alone_s: float
    alone_cpu_s: float
    direct_s: float
    num_direct: int
    same_labels: float
    """Share of the tissue's cells with the label of the simple loop."""

    def __str__(self) -> str:
        return (
            f"model {self.alone_s:.1f} s, engine {self.run.computing:.1f} of "
            f"{self.run.total:.1f} s, twice the area {self.double.total:.1f} s, direct "
            f"{self.direct_s:.1f} s"
        )


def _one_round(bench: _Bench, one: Path, two: Path, tiles: NDArray[np.uint8]) -> _Round:
    run = bench.command(one)
    alone_s, alone_cpu_s = bench.model_alone(tiles, run.num_tiles)
    repeated = bench.repeated(one, DEFAULT)
    all_formats = bench.repeated(one, tuple(FORMATS))
    double = bench.command(two)
    direct_s, num_direct, labels = bench.direct(one)
    ours = np.asarray(array_of(zarr.open_group(run.store, mode="r"), LABELS)[:])
    same = (labels[: ours.shape[0], : ours.shape[1]] == ours)[ours > 0]
    return _Round(
        run=run,
        repeated=repeated,
        all_formats=all_formats,
        double=double,
        alone_s=alone_s,
        alone_cpu_s=alone_cpu_s,
        direct_s=direct_s,
        num_direct=num_direct,
        same_labels=float(same.mean()),
    )


def run_benchmark(command: SlidesBenchmark, console: Console) -> SlidesReport:
    """Measure all variants in turns."""
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(command.settings, Path(folder))
        mpp, side = bench.manifest.mpp, command.side_px
        assert mpp is not None
        one, two = Path(folder) / "one.svs", Path(folder) / "two.svs"
        write_slide(one, side, side, mpp, command.drawn_px)
        write_slide(two, side, 2 * side, mpp, command.drawn_px)
        tiles = tiles_in_memory(one, bench.manifest.tile_size_px)
        rounds = []
        for number in range(command.rounds):
            rounds.append(_one_round(bench, one, two, tiles))
            console.print(f"round {number + 1}: {rounds[-1]}")
        report = _report(bench, command, rounds)
        bench.close()
    return report


def _report(bench: _Bench, command: SlidesBenchmark, rounds: Sequence[_Round]) -> SlidesReport:
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
        beyond_inference=median(r.run.beyond / (r.run.total - r.run.beyond) for r in rounds),
        beyond_inference_wall=median(r.run.total / r.alone_s - 1 for r in rounds),
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
    command.out.mkdir(parents=True, exist_ok=True)
    path = command.out / "slides.json"
    path.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
