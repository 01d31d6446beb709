"""Measures the model on a GPU, and its share of the GPU's measured peak: `make benchmark-gpu`.

Each variant runs in its own process, on batches of 1, 4, 8 and 16 tiles. Decoding images, copying
to the GPU and back, computing, and encoding labels are timed separately. A variant that fails, for
lack of a package or of memory, is noted, and the others still run: the files are written again
after every measurement. With `--device cpu` and a tiny model,
everything runs except the calls of CUDA and TensorRT.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro
from rich.console import Console

from benchmarks.export_gpu_report import GpuMeasurement, GpuReport, markdown
from benchmarks.export_gpu_variants import VARIANTS, Device, Task
from benchmarks.export_gpu_worker import (
    EXPECTED_FILE,
    Failed,
    Measured,
    Throughput,
    measure,
    measure_peak,
    write_graphs,
)
from benchmarks.harness import one_line_errors, write_report
from benchmarks.real_size_model import FLOPS_PER_TILE, model_line
from export.errors import FocalPathError
from serve.contract.machine import installed_versions
from train.settings import ModelSettings

_PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu", "tensorrt-cu13", "timm", "segment-anything")

T = TypeVar("T")


class NoGpuError(FocalPathError):
    """There is no GPU to measure."""

    exit_status = 2


@dataclass(frozen=True, kw_only=True)
class GpuBenchmark:
    """Measure the model on this machine's GPU."""

    out: Path = Path("artifacts/results/export")
    """Folder for benchmark_gpu.json and benchmark_gpu.md."""
    batch_sizes: tuple[int, ...] = (1, 4, 8, 16)
    """Tiles per batch."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Variants to measure; the others' labels are compared with those of the first."""
    runs: int = 20
    """Measured runs per variant and batch size, after three warm-up runs."""
    device: Device = "cuda"
    """cpu is only for testing the script."""
    peak_size: int = 8192
    """Side of the square matrices whose product measures the peak."""
    graphs: Path | None = None
    """Folder to keep the exported graphs in, and to take them from; by default they are deleted."""
    model: ModelSettings = field(default_factory=ModelSettings)

    def run(self) -> GpuReport:
        """Measure, and write both files.

        Raises:
            FocalPathError: a variant is unknown.
            NoGpuError: there is no GPU and the device is not cpu.
        """
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown:
            raise FocalPathError(
                f"unknown variants: {', '.join(unknown)}; expected some of {'; '.join(VARIANTS)}"
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise NoGpuError(
                "torch sees no CUDA GPU, and this benchmark needs one. Run `make benchmark-gpu` on "
                "a machine that has one; `make benchmark-export` measures this machine's CPU."
            )
        with ExitStack() as stack:
            folder = self.graphs
            if folder is None:
                temporary = tempfile.TemporaryDirectory(prefix="focalpath-benchmark-")
                folder = Path(stack.enter_context(temporary))
            folder.mkdir(parents=True, exist_ok=True)
            return _Run(self, folder).all()


class _Run:
    """One run of the benchmark, with the measurements so far."""

    def __init__(self, settings: GpuBenchmark, folder: Path) -> None:
        self._settings = settings
        self._folder = folder
        self._console = Console(stderr=True)
        self._skipped: dict[str, str] = {}
        self._measurements: list[GpuMeasurement] = []
        self._has_form: dict[str, bool] = {}
        (folder / EXPECTED_FILE).unlink(missing_ok=True)  # of another run
        with _own_process() as call:
            peak = call(measure_peak, settings.device, settings.peak_size)
        if isinstance(peak, Failed):
            raise FocalPathError(f"the GPU cannot even multiply two matrices: {peak.why}")
        self._peak: Throughput = peak
        self._tell(f"{peak.device}: {peak.flops / 1e12:.1f} TFLOP/s in bfloat16")

    def all(self) -> GpuReport:
        """Measure every variant."""
        for name in self._settings.variants:
            form = VARIANTS[name].form
            if form is None or self._has_graphs(form):
                self._measure(name)
        return self._write()

    def _has_graphs(self, form: str) -> bool:
        """Whether the graphs of a form exist; exports them when they are first needed."""
        if form not in self._has_form:
            self._tell(f"Exporting, attention {form}")
            with _own_process() as call:
                written = call(write_graphs, self._settings.model, self._folder, form)
            self._has_form[form] = not isinstance(written, Failed)
            if isinstance(written, Failed):
                self._skip(f"the graphs of {form} attention", written.why)
        return self._has_form[form]

    def _measure(self, name: str) -> None:
        settings = self._settings
        task = Task(
            variant=name,
            folder=self._folder,
            model=settings.model,
            device=settings.device,
            batch_sizes=settings.batch_sizes,
            num_runs=settings.runs,
        )
        with _own_process() as call:
            for batch_size in settings.batch_sizes:
                measured = call(measure, task, batch_size)
                if isinstance(measured, Failed):
                    # Larger batches would fail too, and the GPU may no longer be usable.
                    first = batch_size == settings.batch_sizes[0]
                    self._skip(name if first else f"{name}, batch {batch_size}", measured.why)
                    return
                self._note(name, batch_size, measured)

    def _note(self, name: str, batch_size: int, measured: Measured) -> None:
        rate = batch_size / measured.stages.compute_ms * 1e3
        is_real_size = self._settings.model == ModelSettings()
        self._measurements.append(
            GpuMeasurement(
                **measured.model_dump(),
                variant=name,
                batch_size=batch_size,
                tiles_per_second=rate,
                peak_share=rate * FLOPS_PER_TILE / self._peak.flops if is_real_size else None,
            )
        )
        self._tell(f"{name}, batch {batch_size}: {rate:.1f} tiles/s")
        self._write()

    def _skip(self, name: str, why: str) -> None:
        self._skipped[name] = why
        self._tell(f"{name}: {why}")
        self._write()

    def _write(self) -> GpuReport:
        settings = self._settings
        report = GpuReport(
            device=self._peak.device,
            versions=installed_versions(_PACKAGES),
            model=model_line(settings.model),
            tile_size_px=settings.model.tile_size_px,
            num_runs=settings.runs,
            peak_tflops=self._peak.flops / 1e12,
            skipped=self._skipped,
            measurements=tuple(self._measurements),
        )
        write_report(settings.out, "benchmark_gpu", report, markdown(report))
        return report

    def _tell(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


Call = Callable[..., Any]


@contextmanager
def _own_process() -> Iterator[Call]:
    """Yield a function that calls others in another process; `Failed` if that process dies."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:

        def call(function: Callable[..., T | Failed], *arguments: Any) -> T | Failed:
            try:
                return pool.submit(function, *arguments).result()
            except BrokenProcessPool:
                return Failed("its process died; its output above says why")

        yield call


@one_line_errors()
def main() -> None:
    """Run the benchmark and print its table; exits with status 2 if there is no GPU."""
    config: Any = (tyro.conf.OmitArgPrefixes,)
    benchmark = tyro.cli(GpuBenchmark, prog="python -m benchmarks.export_gpu", config=config)
    try:
        sys.stdout.write(markdown(benchmark.run()))
    except FocalPathError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(getattr(error, "exit_status", 1))


if __name__ == "__main__":
    main()
