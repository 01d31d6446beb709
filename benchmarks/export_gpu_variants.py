"""The variants of `make benchmark-gpu`: how each is loaded and run."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.direct_sam_path import DirectSamPath
from benchmarks.real_size_model import NUM_CLASSES, build_benchmark_model
from export.errors import FocalPathError
from export.graph.attention import AttentionForm
from export.graph.encoders import FoldedSegmenter
from export.graph.nodes import PARITY_OUTPUT
from export.graph.reference import Deployable
from export.tensorrt.build import build_plan
from export.tensorrt.plan import BatchProfile, EnginePlan
from export.tensorrt.requirements import load_tensorrt
from export.tensorrt.session import Gpu, PlanSession
from serve.contract import cuda
from serve.contract.manifest import LOW_RES_STRIDE, interface, sha256_of
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


FORMS = {
    "chunked": AttentionForm(),
    "unchunked": AttentionForm(max_queries=None),
    "extended": AttentionForm(positions="extended", max_queries=None),
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
