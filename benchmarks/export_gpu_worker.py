"""The variants of `make benchmark-gpu` and their timing, which run in other processes.

The functions return `Failed` on any error, so that a failed variant is a line of the report.
"""

import io
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.direct_sam_path import DirectSamPath
from benchmarks.harness import seconds_of
from benchmarks.real_size_model import NUM_CLASSES, build_benchmark_model, draw_tiles
from export.errors import FocalPathError
from export.graph.attention import AttentionForm
from export.graph.encoders import FoldedSegmenter
from export.graph.nodes import PARITY_OUTPUT
from export.graph.reference import Deployable
from export.graph.to_onnx import OPSETS, drop_output, export_onnx
from export.precision.half import convert_to_half
from export.tensorrt.build import build_plan
from export.tensorrt.engine import load_tensorrt
from export.tensorrt.plan import BatchProfile, EnginePlan
from export.tensorrt.session import Gpu, PlanSession
from serve.contract import cuda
from serve.contract.machine import this_processor
from serve.contract.manifest import LOW_RES_STRIDE, interface, sha256_of
from serve.contract.strict import Strict
from train.settings import ModelSettings

Device = Literal["cuda", "cpu"]
Images = NDArray[np.uint8]


class Answer(NamedTuple):
    """What a variant computes."""

    labels: torch.Tensor
    """(B, H, W) integers, 1..C."""
    logits: torch.Tensor | None = None
    """(B, C, H/4, W/4); None where the variant does not give them."""


Compute = Callable[[torch.Tensor], Answer]
"""From images (B, H, W, 3) uint8 on the device."""

_WARM_UP_RUNS = 3
_CODEC_RUNS = 3
"""Decoding and encoding do not depend on the variant, and take longer than the model."""
_OPERATOR_OPSET = 23
"""The first with ONNX's Attention operator."""
_NUM_DRAWN = 2
"""Tiles that are drawn, which takes seconds each; the others are these, turned."""
EXPECTED_FILE = "expected.npz"
"""Answers of the first variant."""

P = ParamSpec("P")
T = TypeVar("T")


class Stages(Strict):
    """Median milliseconds per batch."""

    decode_ms: float
    copy_ms: float
    """To the device and back."""
    compute_ms: float
    encode_ms: float
    first_run_ms: float
    """The first computation of this batch size, which chooses kernels and takes memory."""


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
    max_logit_difference: float | None
    num_not_finite: int | None
    """Logits that are NaN or infinite."""


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
    "operator": AttentionForm(max_queries=None, operator=True),
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
    """Export the model in float32 and half precision, with and without the gate's output."""
    source = folder / f"{form}.fp32.logits.onnx"
    if not source.is_file():
        building = source.with_suffix(".part")
        deployable = Deployable(build_benchmark_model(model)).eval()
        opset = _OPERATOR_OPSET if FORMS[form].operator else OPSETS[0]
        export_onnx(deployable, building, opset=opset, form=FORMS[form])
        building.rename(source)
    half = folder / f"{form}.fp16.logits.onnx"
    if not half.is_file():
        onnx.save(convert_to_half(onnx.load(str(source)), "fp16"), str(half))
    for path in (source, half):
        drop_output(path, folder / path.name.replace(".logits", ""), PARITY_OUTPUT)


@_or_failed
def measure(task: Task, batch_size: int) -> Measured:
    """Measure a variant; it stays loaded in this process."""
    compute = _load(task)
    drawn = _drawn(task)
    tiles = (np.rot90(drawn[i % len(drawn)], i // len(drawn)) for i in range(batch_size))
    pictures = [png(tile) for tile in tiles]
    answer, stages = measure_stages(compute, pictures, task.device, task.num_runs)
    memory_gib = None
    if task.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        memory_gib = (total - free) / 2**30
    labels = answer.labels.cpu().numpy().astype(np.uint8)
    logits = None if answer.logits is None else answer.logits.float().cpu().numpy()
    return Measured(stages, memory_gib, *_compare(labels, logits, task))


def _drawn(task: Task) -> Images:
    """Tiles for all variants: (N, H, W, 3) uint8 RGB."""
    file = task.folder / "tiles.npy"
    if not file.is_file():
        np.save(file, draw_tiles(_NUM_DRAWN, task.model.tile_size_px))
    return np.load(file)  # type: ignore[no-any-return]


_loaded: dict[tuple[str, Path], Compute] = {}
"""Variants that this process has loaded, by name and by the folder of their graphs."""


def _load(task: Task) -> Compute:
    key = (task.variant, task.folder)
    if key not in _loaded:
        _loaded[key] = VARIANTS[task.variant].load(task)
    return _loaded[key]


def _compare(
    labels: Images, logits: NDArray[np.float32] | None, task: Task
) -> tuple[float, float | None, int | None]:
    """Compare with the first variant that ran, on the tiles of both.

    Returns:
        the share of labels that are the same, the largest difference of a logit, and how many
        logits are NaN or infinite.
    """
    file = task.folder / EXPECTED_FILE
    stored = dict(np.load(file)) if file.is_file() else {"variant": np.array(task.variant)}
    if str(stored["variant"]) == task.variant:
        stored["labels"] = labels
        if logits is not None:
            stored["logits"] = logits
        np.savez(file, **stored)
    expected = stored["labels"]
    num_tiles = min(len(labels), len(expected))
    agreement = float((labels[:num_tiles] == expected[:num_tiles]).mean())
    if logits is None or "logits" not in stored:
        return agreement, None, None
    num_tiles = min(len(logits), len(stored["logits"]))
    difference = np.abs(logits[:num_tiles] - stored["logits"][:num_tiles])
    finite = difference[np.isfinite(difference)]
    largest = float(finite.max()) if finite.size else None
    return agreement, largest, int((~np.isfinite(logits)).sum())


def measure_stages(
    compute: Compute, pictures: list[bytes], device: Device, num_runs: int
) -> tuple[Answer, Stages]:
    """Time the stages of a batch of PNG images; returns the last answer."""
    side = Image.open(io.BytesIO(pictures[0])).size[0]
    # Pinned memory, as in a server: the GPU copies it without the CPU.
    pinned = device == "cuda"
    on_host = torch.empty((len(pictures), side, side, 3), dtype=torch.uint8, pin_memory=pinned)
    labels = torch.empty((len(pictures), side, side), dtype=torch.uint8, pin_memory=pinned)
    decode = [_milliseconds(lambda: _decode(pictures, on_host)) for _ in range(_CODEC_RUNS)]
    times: list[tuple[float, ...]] = []
    for _ in range(_WARM_UP_RUNS + num_runs):
        marks = [time.perf_counter()]
        images = on_host.to(device, non_blocking=True)
        synchronize(device)
        marks.append(time.perf_counter())
        answer = compute(images)
        synchronize(device)
        marks.append(time.perf_counter())
        labels.copy_(answer.labels, non_blocking=True)
        synchronize(device)
        marks.append(time.perf_counter())
        copy, computing, back = np.diff(marks) * 1e3
        times.append((copy + back, computing))
    encode = [
        _milliseconds(lambda: [png(one) for one in labels.numpy()]) for _ in range(_CODEC_RUNS)
    ]
    medians = [float(value) for value in np.median(times[_WARM_UP_RUNS:], axis=0)]
    return answer, Stages(
        decode_ms=statistics.median(decode),
        copy_ms=medians[0],
        compute_ms=medians[1],
        encode_ms=statistics.median(encode),
        first_run_ms=times[0][1],
    )


def _decode(pictures: list[bytes], images: torch.Tensor) -> None:
    for place, picture in zip(images.numpy(), pictures, strict=True):
        place[:] = np.asarray(Image.open(io.BytesIO(picture)))


def _milliseconds(run: Callable[[], object]) -> float:
    return seconds_of(run) * 1e3


def synchronize(device: Device) -> None:
    """Wait until the device has finished all its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def png(image: NDArray[np.uint8]) -> bytes:
    """Encode an image as a PNG, as the service does."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def _float32_is_exact(task: Task) -> None:
    """Have torch multiply float32 as float32: no products in TF32 behind it."""
    if task.device == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined, unused-ignore]


def _direct(task: Task, dtype: torch.dtype) -> Compute:
    """SAM-Path as its paper describes it; half precision by autocast, as usual."""
    _float32_is_exact(task)
    model = DirectSamPath(build_benchmark_model(task.model)).requires_grad_(False).to(task.device)

    def compute(images: torch.Tensor) -> Answer:
        is_half = dtype != torch.float32
        with torch.inference_mode(), torch.autocast(task.device, dtype, enabled=is_half):
            logits = model.low_res_logits(images)
            return Answer(model.labels(logits, images.shape[1:3]), logits)

    return compute


def _eager(task: Task) -> Compute:
    _float32_is_exact(task)
    model = _deployable(task).to(task.device)

    def compute(images: torch.Tensor) -> Answer:
        with torch.inference_mode():
            output = model(images)
        return Answer(output.labels, output.low_res_logits)

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

    def compute(images: torch.Tensor) -> Answer:
        with torch.inference_mode(), torch.autocast(task.device, torch.bfloat16):
            output = compiled(images)
        return Answer(output.labels, output.low_res_logits)

    return compute


def _session(task: Task, settings: dict[str, str]) -> Any:
    """Open the variant's graph in ONNX Runtime, on the task's device."""
    import onnxruntime

    path = task.folder / VARIANTS[task.variant].graph.replace(".onnx", ".logits.onnx")
    if task.device == "cuda":
        return cuda.open_session(path, settings=settings)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def _onnx_runtime(task: Task, **settings: str) -> Compute:
    """Inputs and outputs stay in the GPU's memory."""
    session = _session(task, {"use_tf32": "0", **settings})
    outputs: dict[int, Answer] = {}

    def compute(images: torch.Tensor) -> Answer:
        number, side = len(images), images.shape[1]
        if number not in outputs:
            low = side // LOW_RES_STRIDE
            outputs[number] = Answer(
                torch.empty(images.shape[:3], dtype=torch.uint8, device=task.device),
                torch.empty((number, NUM_CLASSES, low, low), device=task.device),
            )
        answer = outputs[number]
        binding = session.io_binding()
        bind = _bind(binding, task.device)
        bind(binding.bind_input, "image", images.contiguous(), np.uint8)
        bind(binding.bind_output, "labels", answer.labels, np.uint8)
        bind(binding.bind_output, PARITY_OUTPUT, answer.logits, np.float32)
        for output in session.get_outputs():
            if output.name not in ("labels", PARITY_OUTPUT):
                binding.bind_output(output.name, task.device)
        session.run_with_iobinding(binding)
        return answer

    return compute


def _bind(binding: Any, device: Device) -> Callable[..., None]:
    def bind(method: Callable[..., None], name: str, tensor: torch.Tensor, dtype: type) -> None:
        method(name, device, 0, dtype, tuple(tensor.shape), tensor.data_ptr())

    return bind


def _onnx_runtime_arrays(task: Task, **settings: str) -> Compute:
    """As the service runs it: arrays in the CPU's memory go in and come out."""
    session = _session(task, settings)
    names = ["labels", "low_res_probabilities", "iou_scores"]
    on_host: dict[int, Images] = {}

    def compute(images: torch.Tensor) -> Answer:
        if len(images) not in on_host:
            on_host[len(images)] = images.cpu().numpy()
        labels = session.run(names, {"image": on_host[len(images)]})[0]
        return Answer(torch.from_numpy(labels))

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

    def compute(images: torch.Tensor) -> Answer:
        session, replay = loaded.get(len(images)) or load(len(images))
        session.tensor("image").copy_(images)
        gpu.synchronize()
        replay()
        gpu.synchronize()
        return Answer(session.tensor("labels"))

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
    "SAM-Path, PyTorch eager fp32": Variant(partial(_direct, dtype=torch.float32)),
    "SAM-Path, PyTorch eager bf16": Variant(partial(_direct, dtype=torch.bfloat16)),
    "SAM-Path, PyTorch eager fp16": Variant(partial(_direct, dtype=torch.float16)),
    "PyTorch eager fp32": Variant(_eager),
    "PyTorch bf16 + compile": Variant(partial(_compiled, folded=False)),
    "folded, fused attention, bf16 + compile": Variant(partial(_compiled, folded=True)),
    "ONNX Runtime fp32": Variant(_onnx_runtime, "chunked", "fp32"),
    "ONNX Runtime TF32": Variant(partial(_onnx_runtime, use_tf32="1"), "chunked", "fp32"),
    "ONNX Runtime fp16": Variant(_onnx_runtime, "chunked"),
    "ONNX Runtime fp16, heuristic convolutions": Variant(
        partial(_onnx_runtime, cudnn_conv_algo_search="HEURISTIC"), "chunked"
    ),
    "ONNX Runtime fp16, as served": Variant(_onnx_runtime_arrays, "chunked"),
    "ONNX Runtime fp16, unchunked": Variant(_onnx_runtime, "unchunked"),
    "ONNX Runtime fp16, extended": Variant(_onnx_runtime, "extended"),
    "ONNX Runtime fp16, Attention operator": Variant(_onnx_runtime, "operator"),
    "TensorRT fp16": Variant(_tensorrt, "chunked"),
    "TensorRT fp16, unchunked": Variant(_tensorrt, "unchunked"),
    "TensorRT fp16, extended": Variant(_tensorrt, "extended"),
}
"""The variants; the first is the reference."""


def _deployable(task: Task) -> Deployable:
    return Deployable(build_benchmark_model(task.model)).eval().requires_grad_(False)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")
