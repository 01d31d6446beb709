"""How fast a GPU answers, and what share of its measured peak that is: `make benchmark-gpu`.

Each variant answers batches of 1, 4, 8 and 16 tiles. Decoding pictures, copying to the GPU and
back, computing, and encoding labels are timed apart. It has not run on a GPU yet: on the CPU, with
`--device cpu` and a tiny model, it does all but CUDA's and TensorRT's own calls.
"""

import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict
from rich.console import Console

from export.benchmark import installed_versions, machine_name
from export.benchmark_model import (
    FLOPS_PER_TILE,
    NUM_CLASSES,
    build_benchmark_model,
    draw_tiles,
)
from export.deployable import Deployable
from export.onnx_graph import PARITY_OUTPUT, drop_output, export_onnx
from export.precision import convert_to_half
from serve.errors import FocalPathError
from train.settings import ModelSettings

Device = Literal["cuda", "cpu"]
Compute = Callable[[torch.Tensor], torch.Tensor]
"""From images (B, H, W, 3) to labels (B, H, W), both uint8 on the device."""
GOAL = 0.5
"""Share of the peak that is aimed at; SAM's ViT-B alone has been seen at 0.29 on an A100."""
_PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu", "tensorrt", "timm", "segment-anything")


class Stages(BaseModel):
    """Milliseconds a batch, medians."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    decode_ms: float
    copy_ms: float
    """To the device and back."""
    compute_ms: float
    encode_ms: float


class GpuMeasurement(BaseModel):
    """One variant at one batch size."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    variant: str
    batch_size: int
    stages: Stages
    tiles_per_second: float
    """Of computing alone."""
    peak_share: float | None
    """Of the measured peak in bfloat16; only for the real-size model."""
    label_agreement: float
    """Share of pixels with the label of eager float32."""


class GpuReport(BaseModel):
    """What `benchmark_gpu.json` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str
    versions: dict[str, str]
    model: str
    tile_size_px: int
    num_runs: int
    peak_tflops: float
    """Of a large product in bfloat16, measured."""
    skipped: dict[str, str]
    """Variants that could not run here, and why."""
    measurements: tuple[GpuMeasurement, ...]


class NoGpuError(FocalPathError):
    """There is no GPU to measure."""

    exit_status = 2


@dataclass(frozen=True, kw_only=True)
class GpuBenchmark:
    """Measure the model on this machine's GPU."""

    out: Path = Path("docs/results/export")
    """Folder for benchmark_gpu.json and benchmark_gpu.md."""
    batch_sizes: tuple[int, ...] = (1, 4, 8, 16)
    """Tiles a batch."""
    runs: int = 20
    """Measured runs of each variant and batch size, after three to warm up."""
    device: Device = "cuda"
    """cpu only tries the script out."""
    peak_size: int = 8192
    """Side of the square matrices whose product is the peak."""
    model: ModelSettings = field(default_factory=ModelSettings)

    def run(self) -> GpuReport:
        """Measure and write both files.

        Raises:
            NoGpuError: there is no GPU and the device is not cpu.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise NoGpuError(
                "torch sees no CUDA GPU, and this benchmark needs one. Run `make benchmark-gpu` on "
                "a machine that has one; `make benchmark-export` measures this machine's CPU."
            )
        console = Console(stderr=True)
        peak = measure_peak_flops(self.device, self.peak_size)
        console.print(f"{peak / 1e12:.1f} TFLOP/s in bfloat16")
        skipped: dict[str, str] = {}
        with tempfile.TemporaryDirectory(prefix="focalpath-benchmark-") as name:
            measurements = tuple(self._measure(Path(name), peak, skipped, console))
        report = GpuReport(
            device=torch.cuda.get_device_name() if self.device == "cuda" else machine_name(),
            versions=installed_versions(_PACKAGES),
            model=f"{self.model.image_encoder} + {self.model.pathology_encoder}, "
            f"{NUM_CLASSES} classes, random weights",
            tile_size_px=self.model.tile_size_px,
            num_runs=self.runs,
            peak_tflops=peak / 1e12,
            skipped=skipped,
            measurements=measurements,
        )
        self.out.mkdir(parents=True, exist_ok=True)
        text = report.model_dump_json(indent=2) + "\n"
        (self.out / "benchmark_gpu.json").write_text(text, encoding="utf-8")
        (self.out / "benchmark_gpu.md").write_text(markdown(report), encoding="utf-8")
        return report

    def _measure(
        self, folder: Path, peak: float, skipped: dict[str, str], console: Console
    ) -> Iterator[GpuMeasurement]:
        tiles = draw_tiles(max(self.batch_sizes), self.model.tile_size_px)
        pictures = [_png(tile) for tile in tiles]
        deployable = Deployable(build_benchmark_model(self.model)).eval().requires_grad_(False)
        _write_graphs(deployable, folder)
        expected: dict[int, NDArray[np.uint8]] = {}
        for name, load in _variants(deployable, folder, self).items():
            try:
                compute = load()
            except _SkipVariant as reason:
                skipped[name] = str(reason)
                console.print(f"{name}: {reason}")
                continue
            for batch_size in self.batch_sizes:
                labels, stages = measure_stages(
                    compute, pictures[:batch_size], self.device, self.runs
                )
                rate = batch_size / stages.compute_ms * 1e3
                is_real_size = self.model == ModelSettings()
                yield GpuMeasurement(
                    variant=name,
                    batch_size=batch_size,
                    stages=stages,
                    tiles_per_second=rate,
                    peak_share=rate * FLOPS_PER_TILE / peak if is_real_size else None,
                    label_agreement=float(
                        (expected.setdefault(batch_size, labels) == labels).mean()
                    ),
                )
                console.print(f"{name}, batch {batch_size}: {rate:.1f} tiles/s")
            del compute
            if self.device == "cuda":
                torch.cuda.empty_cache()


class _SkipVariant(Exception):
    """A variant cannot run on this machine; the text says why."""


def measure_peak_flops(device: Device, size: int) -> float:
    """What the device reaches in a product of two bfloat16 matrices of side `size`."""
    left, right = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        left @ right
    times = []
    for _ in range(10):
        synchronize(device)
        started = time.perf_counter()
        left @ right
        synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times)


def measure_stages(
    compute: Compute, pictures: list[bytes], device: Device, num_runs: int
) -> tuple[NDArray[np.uint8], Stages]:
    """Time the stages of a batch of PNG pictures; the labels are (B, H, W) uint8."""
    times: list[tuple[float, ...]] = []
    for _ in range(3 + num_runs):
        marks = [time.perf_counter()]
        images = np.stack([np.asarray(Image.open(io.BytesIO(picture))) for picture in pictures])
        marks.append(time.perf_counter())
        on_device = torch.from_numpy(images).to(device)
        synchronize(device)
        marks.append(time.perf_counter())
        on_device = compute(on_device)
        synchronize(device)
        marks.append(time.perf_counter())
        labels = on_device.cpu().numpy()
        marks.append(time.perf_counter())
        for one in labels:
            _png(one)
        marks.append(time.perf_counter())
        decode, copy, computing, back, encode = np.diff(marks) * 1e3
        times.append((decode, copy + back, computing, encode))
    medians = [float(value) for value in np.median(times[3:], axis=0)]
    return labels, Stages(
        decode_ms=medians[0], copy_ms=medians[1], compute_ms=medians[2], encode_ms=medians[3]
    )


def synchronize(device: Device) -> None:
    """Wait for all that was given to the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def markdown(report: GpuReport) -> str:
    """The report as a table."""
    lines = [
        "# The model on a GPU",
        "",
        f"{report.device}, {report.peak_tflops:.0f} TFLOP/s measured in bfloat16; "
        + ", ".join(f"{name} {found}" for name, found in report.versions.items())
        + ".",
        f"{report.model}; tiles of {report.tile_size_px} pixels; medians of {report.num_runs} "
        f"runs, milliseconds a batch. Goal: {GOAL:.0%} of the peak. Written by "
        "`make benchmark-gpu`.",
        "",
        "| variant | batch | decode | copy | compute | encode | tiles/s | of peak | labels |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in report.measurements:
        share = "" if row.peak_share is None else f"{row.peak_share:.1%}"
        stages = row.stages
        lines.append(
            f"| {row.variant} | {row.batch_size} | {stages.decode_ms:.1f} | {stages.copy_ms:.1f} "
            f"| {stages.compute_ms:.1f} | {stages.encode_ms:.1f} | {row.tiles_per_second:.1f} "
            f"| {share} | {row.label_agreement:.3%} |"
        )
    lines += ["", *(f"- {name} did not run: {why}" for name, why in report.skipped.items())]
    return "\n".join(lines).rstrip() + "\n"


def _write_graphs(deployable: Deployable, folder: Path) -> None:
    export_onnx(deployable, folder / "with_logits.onnx")
    drop_output(folder / "with_logits.onnx", folder / "model.onnx", PARITY_OUTPUT)
    half = convert_to_half(onnx.load(str(folder / "model.onnx")), "fp16")
    onnx.save(half, str(folder / "model.fp16.onnx"))


def _variants(
    deployable: Deployable, folder: Path, settings: GpuBenchmark
) -> Mapping[str, Callable[[], Compute]]:
    """What to measure, each loaded when its turn comes; the first is the reference."""
    device = settings.device
    return {
        "PyTorch eager fp32": lambda: _eager(deployable, device),
        "PyTorch bf16 + compile": lambda: _compiled(deployable, device),
        "ONNX Runtime fp32": lambda: _onnx_runtime(folder / "model.onnx", device),
        "ONNX Runtime fp16": lambda: _onnx_runtime(folder / "model.fp16.onnx", device),
        "TensorRT fp16": lambda: _tensorrt(folder / "model.fp16.onnx", settings),
    }


def _eager(deployable: Deployable, device: Device) -> Compute:
    # float32 means float32: no products in TF32 behind it.
    torch.set_float32_matmul_precision("highest")
    model = deployable.to(device)

    def compute(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model(images).labels  # type: ignore[no-any-return]

    return compute


def _compiled(deployable: Deployable, device: Device) -> Compute:
    # On the CPU, where only the script is tried out, nothing is compiled.
    backend = {"cuda": "inductor", "cpu": "eager"}[device]
    compiled: Any = torch.compile(deployable.to(device), backend=backend)

    def compute(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
            return compiled(images).labels  # type: ignore[no-any-return]

    return compute


def _onnx_runtime(path: Path, device: Device) -> Compute:
    import onnxruntime

    provider = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}[device]
    if provider not in onnxruntime.get_available_providers():
        raise _SkipVariant(
            f"ONNX Runtime has no {provider}: install onnxruntime-gpu in place of onnxruntime"
        )
    session = onnxruntime.InferenceSession(path, providers=[provider])

    def compute(images: torch.Tensor) -> torch.Tensor:
        # Inputs and outputs stay where torch has them.
        labels = torch.empty(images.shape[:3], dtype=torch.uint8, device=device)
        binding = session.io_binding()
        for name, tensor, bind in (
            ("image", images.contiguous(), binding.bind_input),
            ("labels", labels, binding.bind_output),
        ):
            bind(name, device, 0, np.uint8, tuple(tensor.shape), tensor.data_ptr())
        for output in session.get_outputs():
            if output.name != "labels":
                binding.bind_output(output.name, device)
        session.run_with_iobinding(binding)
        return labels

    return compute


def _tensorrt(path: Path, settings: GpuBenchmark) -> Compute:
    if settings.device == "cpu":
        raise _SkipVariant("TensorRT has no CPU")
    if not find_spec("tensorrt"):
        raise _SkipVariant("the package tensorrt is not installed")
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise _SkipVariant(f"TensorRT cannot read the graph: {parser.get_error(0).desc()}")
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    side, largest = settings.model.tile_size_px, max(settings.batch_sizes)
    profile.set_shape("image", *((size, side, side, 3) for size in (1, largest, largest)))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _SkipVariant("TensorRT built no plan; its log says why")
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    return _run_engine(trt, runtime, engine)


def _run_engine(trt: Any, runtime: Any, engine: Any) -> Compute:
    context = engine.create_execution_context()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    types = {trt.DataType.UINT8: torch.uint8, trt.DataType.FLOAT: torch.float32}

    def compute(images: torch.Tensor) -> torch.Tensor:
        assert runtime is not None, "it has to outlive the engine"
        images = images.contiguous()
        context.set_input_shape("image", tuple(images.shape))
        tensors = {"image": images}
        for name in names:
            if name not in tensors:
                dtype = types[engine.get_tensor_dtype(name)]
                shape = tuple(context.get_tensor_shape(name))
                tensors[name] = torch.empty(shape, dtype=dtype, device="cuda")
            context.set_tensor_address(name, tensors[name].data_ptr())
        torch.cuda.synchronize()
        if not context.execute_async_v3(stream.cuda_stream):
            raise FocalPathError("TensorRT failed to run the plan; its log above says why.")
        stream.synchronize()
        return tensors["labels"]

    return compute


def _png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def main() -> None:
    """Run the benchmark and print its table; without a GPU end with status 2."""
    config: Any = (tyro.conf.OmitArgPrefixes,)
    benchmark = tyro.cli(GpuBenchmark, prog="python -m export.benchmark_gpu", config=config)
    try:
        sys.stdout.write(markdown(benchmark.run()))
    except NoGpuError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
