"""Measures whether the slide engine keeps a GPU busy.

One process, one model, a generated slide that is all tissue. The model alone gets tiles from
memory, first as full batches and then as single tiles through the batcher that the engine uses.
The engine then runs the slide with several numbers of reading threads and batches at a time. An
engine whose model takes no time shows how many tiles reading, blending and writing could feed.
"""

import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.generated_slide import Clock, SlideOptions, segment, tiles_in_memory, write_slide
from benchmarks.gpu_watch import watched_gpu
from benchmarks.harness import one_line_errors, write_report
from benchmarks.slides_gpu_report import Row, SlidesGpuReport, markdown
from benchmarks.stub_models import InstantModel
from serve.contract.machine import installed_versions, peak_memory_mib, this_machine
from serve.contract.manifest import LOW_RES_STRIDE, read_bundle
from serve.inference.batching import TileAnswer, TileRunner
from serve.inference.segmenter import open_segmenter
from serve.slides.finish import read_passport
from serve.slides.local import LocalEngine, model_of
from serve.slides.options import RunOptions
from serve.slides.outputs.registry import formats_of
from serve.slides.plan import ModelInfo
from serve.slides.run import Cohort

_OUTPUT = "low_res_probabilities"
_PACKAGES = ("onnxruntime-gpu", "onnxruntime", "openslide-bin", "tifffile", "imagecodecs", "zarr")


@dataclass(frozen=True, kw_only=True)
class SlidesGpuBenchmark(SlideOptions):
    """Measure the slide engine on a GPU."""

    side_px: int = 18_688
    """Side of the slide."""
    parallel: tuple[int, ...] = (1, 2)
    """Batches at a time."""
    read_threads: tuple[int, ...] = (2, 4, 8)
    """Reading threads; the first is also measured with the other values of the other options."""
    block_cells: tuple[int, ...] = (2048, 4096)
    """Sides of blocks; the same holds."""
    readers: tuple[str, ...] = ("tiff", "openslide")
    """Readers; the same holds."""
    alone_s: float = 4.0
    """About how long the model alone is measured."""


class _Bench:
    def __init__(self, command: SlidesGpuBenchmark, folder: Path) -> None:
        self._command, self._folder = command, folder
        self.manifest = read_bundle(command.settings.bundle)
        self.batch = command.settings.max_batch_size or self.manifest.max_batch_size
        self.slide = folder / "slide.svs"
        mpp = self.manifest.mpp or 0.5
        side = command.side_px
        write_slide(self.slide, side, side, mpp, command.drawn_px, tissue_share=1.0)
        self.tiles = tiles_in_memory(self.slide, self.manifest.tile_size_px)
        self.rows: list[Row] = []

    def run(self) -> ModelInfo:
        """Measure everything; returns what ran."""
        command = self._command
        first = command.read_threads[0], command.block_cells[0], command.readers[0]
        model: ModelInfo | None = None
        for parallel in command.parallel:
            settings = command.settings.model_copy(update={"parallel_batches": parallel})
            with open_segmenter(settings, self.manifest) as segmenter:
                model = model_of(segmenter)
                self._full_batches(segmenter.backend, parallel)
                alone = self._batched(segmenter.backend, parallel)
                is_last = parallel == command.parallel[-1]
                for threads, block, reader in self._ways(first, is_last):
                    self._engine(segmenter.backend, model, parallel, threads, block, reader, alone)
        assert model is not None
        side = self.manifest.tile_size_px // LOW_RES_STRIDE
        instant = InstantModel(np.full((1, len(self.manifest.classes), side, side), 40, np.uint8))
        for threads, block, reader in self._ways(first, True):
            self._engine(instant, model, 1, threads, block, reader, None)
        return model

    def _ways(self, first: tuple[int, int, str], is_all: bool) -> list[tuple[int, int, str]]:
        command = self._command
        if not is_all:
            return [first]
        threads, block, reader = first
        return [
            *((other, block, reader) for other in command.read_threads),
            *((threads, other, reader) for other in command.block_cells[1:]),
            *((command.read_threads[-1], block, other) for other in command.readers[1:]),
        ]

    def _full_batches(self, runner: TileRunner, parallel: int) -> None:
        """Full batches of tiles that are one array already: no queue, no copy of tiles."""
        backend = runner._backend  # type: ignore[attr-defined]
        batch = np.ascontiguousarray(np.resize(self.tiles, (self.batch, *self.tiles.shape[1:])))
        backend.infer(batch, (_OUTPUT,))
        started = time.perf_counter()
        backend.infer(batch, (_OUTPUT,))
        once = time.perf_counter() - started
        count = max(int(self._command.alone_s / once), 2)

        def work() -> int:
            with ThreadPoolExecutor(parallel) as pool:
                list(pool.map(lambda _: backend.infer(batch, (_OUTPUT,)), range(count)))
            return count * self.batch

        self._row("the model alone, full batches", work, parallel)

    def _batched(self, runner: TileRunner, parallel: int) -> float:
        """Single tiles through the batcher; returns tiles per second."""
        count = max(int(self.rows[-1].tiles_per_second * self._command.alone_s), 2 * self.batch)

        def work() -> int:
            pending: list[Future[TileAnswer]] = []
            for index in range(count):
                pending.append(runner.submit(self.tiles[index % len(self.tiles)], (_OUTPUT,)))
                if len(pending) > 2 * self.batch * parallel:
                    pending.pop(0).result()
            for future in pending:
                future.result()
            return count

        return self._row("the model alone, single tiles", work, parallel).tiles_per_second

    def _engine(
        self,
        runner: TileRunner,
        model: ModelInfo,
        parallel: int,
        threads: int,
        block: int,
        reader: str,
        alone: float | None,
    ) -> None:
        out = self._folder / f"out{len(self.rows)}"
        engine = LocalEngine(
            runner, model, max_batch_size=self.batch * parallel, read_threads=threads
        )
        clock = Clock(time.perf_counter)
        options = RunOptions(block_cells=block, tissue="none", reader=reader)
        cohort = Cohort(out, engine, options, formats_of(("ome-zarr",)), clock)

        def work() -> int:
            (outcome,) = segment(cohort, [self.slide])
            return outcome.num_tiles

        name = f"the engine, {reader}" + ("" if alone else ", a model that takes no time")
        row = self._row(name, work, parallel)
        passport = read_passport(out / self.slide.stem)
        seconds = clock.computed - clock.began
        rate = row.num_tiles / seconds
        changes = {
            "read_threads": threads,
            "block_cells": block,
            "num_tiles_once": passport.num_tiles_once,
            "seconds": seconds,
            "tiles_per_second": rate,
            "share": None if alone is None else rate / alone,
            "waits": {n: s for n, s in passport.seconds.items() if not n.startswith("output")},
        }
        self.rows[-1] = row.model_copy(update=changes)
        _tell(self.rows[-1])

    def _row(self, name: str, work: Any, parallel: int) -> Row:
        cpu, started = time.process_time(), time.perf_counter()
        with watched_gpu() as gpu:
            num_tiles = work()
        seconds = time.perf_counter() - started
        row = Row(
            name=name,
            parallel=parallel,
            read_threads=None,
            block_cells=None,
            num_tiles=num_tiles,
            num_tiles_once=num_tiles,
            seconds=seconds,
            tiles_per_second=num_tiles / seconds,
            share=None,
            cpu_ms_per_tile=(time.process_time() - cpu) * 1e3 / num_tiles,
            waits={},
            gpu=gpu.use(),
        )
        self.rows.append(row)
        if "engine" not in name:
            _tell(row)
        return row


def _tell(row: Row) -> None:
    busy = "" if row.gpu is None else f", GPU busy {row.gpu.busy:.0%}"
    print(
        f"{row.name}, {row.parallel} at a time, {row.read_threads} readers, blocks of "
        f"{row.block_cells}: {row.tiles_per_second:.1f} tiles/s{busy}",
        file=sys.stderr,
        flush=True,
    )


def run_benchmark(command: SlidesGpuBenchmark) -> SlidesGpuReport:
    """Measure, and write both files."""
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(command, Path(folder))
        model = bench.run()
    report = SlidesGpuReport(
        machine=this_machine(),
        packages=installed_versions(_PACKAGES),
        model=f"{bench.manifest.name} {bench.manifest.version}",
        precision=model.precision,
        provider=model.runs_on,
        tile_size_px=bench.manifest.tile_size_px,
        max_batch_size=bench.batch,
        slide_px=command.side_px,
        reader=", ".join(command.readers),
        rows=tuple(bench.rows),
        peak_memory_gib=peak_memory_mib() / 2**10,
    )
    write_report(command.out, "slides_gpu", report, markdown(report))
    return report


if __name__ == "__main__":
    with one_line_errors():
        print(markdown(run_benchmark(tyro.cli(SlidesGpuBenchmark, description=__doc__))))
