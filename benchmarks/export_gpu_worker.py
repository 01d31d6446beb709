"""The variants of `make benchmark-gpu` and their timing, which run in other processes.

The functions return `Failed` on any error, so that a failed variant is a line of the report.
"""

import io
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.real_size_model import NUM_CLASSES, build_benchmark_model, draw_tiles
from export.errors import FocalPathError
from export.graph.attention import AttentionForm
from export.graph.encoders import FoldedSegmenter
from export.graph.reference import Deployable
from export.graph.to_onnx import PARITY_OUTPUT, drop_output, export_onnx
from export.precision.half import convert_to_half
from export.tensorrt.build import build_plan
from export.tensorrt.engine import load_tensorrt
from export.tensorrt.plan import BatchProfile, EnginePlan
from export.tensorrt.session import Gpu, PlanSession
from serve.contract.machine import this_processor
from serve.contract.manifest import interface, sha256_of
from serve.contract.strict import Strict
from train.settings import ModelSettings

Device = Literal["cuda", "cpu"]
Images = NDArray[np.uint8]
Compute = Callable[[torch.Tensor], torch.Tensor]
"""From images (B, H, W, 3) to labels (B, H, W), both uint8 on the device."""

_WARM_UP_RUNS = 3
_EXPECTED_FILE = "expected.npz"

P = ParamSpec("P")
T = TypeVar("T")


class Stages(Strict):
    """Median milliseconds per batch."""

    decode_ms: float
    copy_ms: float
    """To the device and back."""
    compute_ms: float
    encode_ms: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """A variant, and how to measure it."""

    variant: str
    folder: Path
    """Folder of the graphs, and of the labels to compare with."""
    model: ModelSettings
    device: Device
    batch_sizes: tuple[int, ...]
    num_runs: int


@dataclass(frozen=True)
class Throughput:
    """A device, and the rate that it reaches."""

    device: str
    flops: float


@dataclass(frozen=True)
class Measured:
    """The measurement of one variant at one batch size."""

    stages: Stages
    memory_gib: float | None
    label_agreement: float


@dataclass(frozen=True)
class Failed:
    """Why something did not run."""

    why: str


FORMS = {
    "chunked": AttentionForm(),
    "unchunked": AttentionForm(max_queries=None),
    "extended": AttentionForm(
        global_positions="extended", window_positions="extended", max_queries=None
    ),
}
"""Forms of attention in the graphs; the first is the bundle's."""


@dataclass(frozen=True)
class Variant:
    """How to load a variant, and the form and precision of its graph."""

    load: Callable[[Task], Compute]
    form: str | None = None
    precision: Literal["fp32", "fp16"] = "fp16"

    @property
    def graph(self) -> str:
        """File name of the graph."""
        return f"{self.form}.{self.precision}.onnx"


def _or_failed(function: Callable[P, T]) -> Callable[P, T | Failed]:
    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T | Failed:
        try:
            return function(*args, **kwargs)
        except FocalPathError as error:
            return Failed(_first_line(error))
        except Exception as error:  # the other variants must still run
            traceback.print_exc()
            return Failed(f"{type(error).__name__}: {_first_line(error)}")

    return call


@_or_failed
def measure_peak(device: Device, size: int) -> Throughput:
    """Measure the rate of a product of two bfloat16 matrices of side `size`."""
    left, right = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    for _ in range(_WARM_UP_RUNS):
        left @ right
    times = []
    for _ in range(10):
        synchronize(device)
        started = time.perf_counter()
        left @ right
        synchronize(device)
        times.append(time.perf_counter() - started)
    name = torch.cuda.get_device_name() if device == "cuda" else this_processor().name
    return Throughput(name, 2 * size**3 / statistics.median(times))


@_or_failed
def write_graphs(model: ModelSettings, folder: Path, form: str) -> None:
    """Export the model in float32 and half precision, without the gate's output."""
    source = folder / "with_logits.onnx"
    export_onnx(Deployable(build_benchmark_model(model)).eval(), source, form=FORMS[form])
    drop_output(source, folder / f"{form}.fp32.onnx", PARITY_OUTPUT)
    half = convert_to_half(onnx.load(str(source)), "fp16")
    onnx.save(half, str(source))
    drop_output(source, folder / f"{form}.fp16.onnx", PARITY_OUTPUT)
    source.unlink()


@_or_failed
def measure(task: Task, batch_size: int) -> Measured:
    """Measure a variant; it stays loaded in this process."""
    compute = _load(task)
    pictures = [png(tile) for tile in draw_tiles(batch_size, task.model.tile_size_px)]
    labels, stages = measure_stages(compute, pictures, task.device, task.num_runs)
    memory_gib = None
    if task.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        memory_gib = (total - free) / 2**30
    return Measured(stages, memory_gib, _agreement(labels, task))


_loaded: dict[tuple[str, Path], Compute] = {}
"""Variants that this process has loaded, by name and by the folder of their graphs."""


def _load(task: Task) -> Compute:
    key = (task.variant, task.folder)
    if key not in _loaded:
        _loaded[key] = VARIANTS[task.variant].load(task)
    return _loaded[key]


def _agreement(labels: Images, task: Task) -> float:
    """Share of labels equal to those of the first variant that ran, for the tiles of both."""
    file = task.folder / _EXPECTED_FILE
    if file.is_file():
        with np.load(file) as stored:
            variant, expected = str(stored["variant"]), stored["labels"]
    else:
        variant, expected = task.variant, labels
    if variant == task.variant:
        np.savez(file, variant=variant, labels=labels)
    num_tiles = min(len(labels), len(expected))
    return float((labels[:num_tiles] == expected[:num_tiles]).mean())


def measure_stages(
    compute: Compute, pictures: list[bytes], device: Device, num_runs: int
) -> tuple[Images, Stages]:
    """Time the stages of a batch of PNG images; returns labels (B, H, W) uint8."""
    side = Image.open(io.BytesIO(pictures[0])).size[0]
    # Pinned memory, as in a server: the GPU copies it without the CPU.
    on_host = torch.empty(
        (len(pictures), side, side, 3), dtype=torch.uint8, pin_memory=device == "cuda"
    )
    labels_on_host = torch.empty(
        (len(pictures), side, side), dtype=torch.uint8, pin_memory=device == "cuda"
    )
    times: list[tuple[float, ...]] = []
    for _ in range(_WARM_UP_RUNS + num_runs):
        marks = [time.perf_counter()]
        for place, picture in zip(on_host.numpy(), pictures, strict=True):
            place[:] = np.asarray(Image.open(io.BytesIO(picture)))
        marks.append(time.perf_counter())
        images = on_host.to(device, non_blocking=True)
        synchronize(device)
        marks.append(time.perf_counter())
        labels = compute(images)
        synchronize(device)
        marks.append(time.perf_counter())
        labels_on_host.copy_(labels, non_blocking=True)
        synchronize(device)
        marks.append(time.perf_counter())
        for one in labels_on_host.numpy():
            png(one)
        marks.append(time.perf_counter())
        decode, copy, computing, back, encode = np.diff(marks) * 1e3
        times.append((decode, copy + back, computing, encode))
    medians = [float(value) for value in np.median(times[_WARM_UP_RUNS:], axis=0)]
    return labels_on_host.numpy(), Stages(
        decode_ms=medians[0], copy_ms=medians[1], compute_ms=medians[2], encode_ms=medians[3]
    )


def synchronize(device: Device) -> None:
    """Wait until the device has finished all its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def png(image: NDArray[np.uint8]) -> bytes:
    """Encode an image as a PNG, as the service does."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def _eager(task: Task) -> Compute:
    if task.device == "cuda":  # float32 means float32: no products in TF32 behind it
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined, unused-ignore]
    model = _deployable(task).to(task.device)

    def compute(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model(images).labels  # type: ignore[no-any-return]

    return compute


def _compiled(task: Task, *, folded: bool) -> Compute:
    """bfloat16 by autocast: norms, logits and upsampling stay in float32."""
    model: Any = _deployable(task)
    if folded:
        form = AttentionForm(max_queries=None, fused=True)
        model = FoldedSegmenter(model, form).eval()
    # On the CPU, which only tests the script, nothing is compiled. One graph per batch size: a
    # shared one would be slower.
    backend = {"cuda": "inductor", "cpu": "eager"}[task.device]
    compiled: Any = torch.compile(model.to(task.device), backend=backend, dynamic=False)

    def compute(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), torch.autocast(task.device, torch.bfloat16):
            return compiled(images).labels  # type: ignore[no-any-return]

    return compute


def _onnx_runtime(task: Task) -> Compute:
    import onnxruntime

    cuda = ("CUDAExecutionProvider", {"use_tf32": "0"})
    provider: Any = {"cuda": cuda, "cpu": "CPUExecutionProvider"}[task.device]
    name = provider if isinstance(provider, str) else provider[0]
    if name not in onnxruntime.get_available_providers():
        raise FocalPathError(
            f"ONNX Runtime has no {name}: install '.[export-gpu]' in an environment of its own"
        )
    if task.device == "cuda":
        onnxruntime.preload_dlls()
    session = onnxruntime.InferenceSession(
        task.folder / VARIANTS[task.variant].graph, providers=[provider]
    )
    if session.get_providers()[0] != name:
        raise FocalPathError(f"ONNX Runtime fell back from {name}; its output above says why")

    def compute(images: torch.Tensor) -> torch.Tensor:
        # Inputs and outputs stay in torch's memory.
        labels = torch.empty(images.shape[:3], dtype=torch.uint8, device=task.device)
        binding = session.io_binding()
        for name, tensor, bind in (
            ("image", images.contiguous(), binding.bind_input),
            ("labels", labels, binding.bind_output),
        ):
            bind(name, task.device, 0, np.uint8, tuple(tensor.shape), tensor.data_ptr())
        for output in session.get_outputs():
            if output.name != "labels":
                binding.bind_output(output.name, task.device)
        session.run_with_iobinding(binding)
        return labels

    return compute


def _tensorrt(task: Task) -> Compute:
    if task.device == "cpu":
        raise FocalPathError("TensorRT does not run on a CPU")
    trt: ModuleType = load_tensorrt()
    gpu = Gpu()
    loaded: dict[int, tuple[PlanSession, Callable[[], None]]] = {}

    def load(batch_size: int) -> tuple[PlanSession, Callable[[], None]]:
        """Build a plan for this batch size only: a shared one would be tuned for one size."""
        loaded.clear()  # a plan and its CUDA graph hold memory
        plan = engine_plan(task, gpu.compute_capability, batch_size)
        serialized = build_plan(trt, plan, task.folder)
        inputs, outputs = interface(task.model.tile_size_px, NUM_CLASSES)
        logger = trt.Logger(trt.Logger.WARNING)
        session = PlanSession(trt, gpu, serialized, logger, inputs, outputs)
        session.set_batch(batch_size)
        loaded[batch_size] = session, gpu.capture(session.enqueue)
        return loaded[batch_size]

    def compute(images: torch.Tensor) -> torch.Tensor:
        session, replay = loaded.get(len(images)) or load(len(images))
        session.tensor("image").copy_(images)
        gpu.synchronize()
        replay()
        gpu.synchronize()
        return session.tensor("labels")

    return compute


def engine_plan(task: Task, compute_capability: str, batch_size: int) -> EnginePlan:
    """The engine plan of a bundle, for a graph of this benchmark and one batch size."""
    file = task.folder / VARIANTS[task.variant].graph
    return EnginePlan(
        onnx_file=file.name,
        onnx_sha256=sha256_of(file),
        precision="fp16",
        image_size_px=task.model.tile_size_px,
        batch=BatchProfile(opt=batch_size, max=batch_size),
        workspace_bytes=8 << 30,
        builder_optimization_level=4,
        allow_tf32=True,
        compute_capability=compute_capability,
        container_image="",
        serving_image="",
    )


VARIANTS = {
    "PyTorch eager fp32": Variant(_eager),
    "PyTorch bf16 + compile": Variant(lambda task: _compiled(task, folded=False)),
    "folded, fused attention, bf16 + compile": Variant(lambda task: _compiled(task, folded=True)),
    "ONNX Runtime fp32": Variant(_onnx_runtime, "chunked", "fp32"),
    "ONNX Runtime fp16": Variant(_onnx_runtime, "chunked"),
    "ONNX Runtime fp16, unchunked": Variant(_onnx_runtime, "unchunked"),
    "ONNX Runtime fp16, extended": Variant(_onnx_runtime, "extended"),
    "TensorRT fp16": Variant(_tensorrt, "chunked"),
    "TensorRT fp16, unchunked": Variant(_tensorrt, "unchunked"),
    "TensorRT fp16, extended": Variant(_tensorrt, "extended"),
}
"""The variants; the first is the reference."""


def _deployable(task: Task) -> Deployable:
    return Deployable(build_benchmark_model(task.model)).eval().requires_grad_(False)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")
