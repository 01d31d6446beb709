"""The variants that `benchmarks.slides` measures, with one open model."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openslide
from numpy.typing import NDArray

from benchmarks.generated_slide import Clock, segment
from benchmarks.stub_models import RecordedModel
from serve.contract.manifest import LOW_RES_STRIDE, Manifest, read_bundle
from serve.images.tiles import gaussian_window, tile_origins
from serve.inference.batching import TileAnswer, TileRunner
from serve.inference.segmenter import open_segmenter
from serve.settings import InferenceSettings
from serve.slides.cohort import Outcome, SlideTask
from serve.slides.engine import Watcher
from serve.slides.job import SlideJob, prepare
from serve.slides.local import LocalEngine, model_of
from serve.slides.options import RunOptions
from serve.slides.outputs.registry import DEFAULT, FORMATS, formats_of
from serve.slides.run import Cohort
from serve.slides.throughput import for_throughput
from serve.slides.tiling import Tiling
from serve.slides.worker import BlockWorker

_OUTPUT = "low_res_probabilities"


class _InferenceOnly(BlockWorker):
    """Reads tiles and runs the model, and drops the answers."""

    def _take(self, item: object) -> None:
        pass


class Variants:
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

    def command(self, slide: Path) -> "Run":
        """Run the whole command on a slide."""
        return self._run(slide, self.runner, DEFAULT, time.perf_counter)

    def several(self, slides: Sequence[Path]) -> float:
        """Seconds of the whole command on several slides."""
        started = time.perf_counter()
        self._segment(slides, self.runner, DEFAULT, Watcher())
        return time.perf_counter() - started

    def inference(self, slide: Path) -> float:
        """Seconds to plan a slide, read its tiles and run the model, with nothing blended."""
        started = time.perf_counter()
        task = SlideTask(path=slide, name=slide.stem)
        job = SlideJob(
            out=self._new_folder(),
            task=task,
            options=RunOptions(),
            formats=DEFAULT,
            model=self._model,
        )
        prepare(job)
        tiling = Tiling(job.work.plan(), job.work.mask())
        with _InferenceOnly(job.work, self.runner, max_batch_size=self.batch) as worker:
            worker.run(tiling.blocks)
        return time.perf_counter() - started

    def repeated(self, slide: Path, formats: Sequence[str]) -> "Run":
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
    ) -> "Run":
        clock = Clock(now)
        started = now()
        out, (outcome,) = self._segment([slide], runner, formats, clock)
        ended = now()
        return Run(
            total=ended - started,
            planning=clock.began - started,
            computing=clock.computed - clock.began,
            outputs=ended - clock.computed,
            num_tiles=outcome.num_tiles,
            store=out / slide.stem / f"{slide.stem}.ome.zarr",
        )

    def _segment(
        self, slides: Sequence[Path], runner: TileRunner, formats: Sequence[str], watcher: Watcher
    ) -> tuple[Path, list[Outcome]]:
        """Run the whole command; returns its folder too."""
        out = self._new_folder()
        engine = LocalEngine(runner, self._model, max_batch_size=self.batch)
        cohort = Cohort(out, engine, RunOptions(), formats_of(formats), watcher)
        return out, segment(cohort, slides)

    def _new_folder(self) -> Path:
        self._runs += 1
        return self._folder / f"out{self._runs}"

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
                answer = self._simple.submit(region, (_OUTPUT,)).result()[_OUTPUT]
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
class Run:
    """In seconds, wall-clock or CPU."""

    total: float
    planning: float
    computing: float
    outputs: float
    num_tiles: int
    store: Path
