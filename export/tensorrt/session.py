"""Runs a TensorRT plan and measures it.

Torch provides memory, streams and CUDA graphs. Callers pass in the `tensorrt` module.
"""

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from export.errors import EngineError
from export.gate.answers import Answers, Outputs
from export.graph.nodes import ModelGraph
from export.tensorrt.plan import EnginePlan
from export.tensorrt.report import Latency
from serve.contract.manifest import TensorSpec

WARM_UP_RUNS = 10
MEASURED_RUNS = 100

# TensorRT's names for kernels of a whole attention: _gemm_mha_v2_myl3_6, fmha_v2_, _gemv_mha_v1.
_FUSED_ATTENTION = re.compile(r"(?<![a-z])f?mha(?![a-z])", re.IGNORECASE)

_TENSORRT_TYPES = {"uint8": "UINT8", "float32": "FLOAT"}
_TORCH_TYPES = {"uint8": torch.uint8, "float32": torch.float32}


class Gpu:
    """The parts of CUDA that a plan needs: memory, one stream and graphs."""

    def __init__(self) -> None:
        major, minor = torch.cuda.get_device_capability()
        self.name = torch.cuda.get_device_name()
        self.compute_capability = f"{major}.{minor}"
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    @classmethod
    def find(cls) -> Self | None:
        """The current CUDA device, or None on a machine without one."""
        return cls() if torch.cuda.is_available() else None

    @property
    def stream_handle(self) -> int:
        """The `cudaStream_t` as an integer, for TensorRT."""
        return int(self._stream.cuda_stream)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Allocate device memory for a tensor."""
        return torch.empty(shape, dtype=dtype, device="cuda")

    def synchronize(self) -> None:
        """Wait for all work on the device."""
        torch.cuda.synchronize()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record one call as a CUDA graph; return a function that replays it."""
        run()  # the first call with a new shape does work that a graph cannot record
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            run()

        def replay() -> None:
            with torch.cuda.stream(self._stream):
                graph.replay()

        return replay


class PlanSession:
    """A deserialised plan with memory for one batch size at a time."""

    def __init__(
        self,
        trt: ModuleType,
        gpu: Gpu,
        serialized: bytes,
        logger: Any,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
    ) -> None:
        self._trt = trt
        self._gpu = gpu
        self._specs = {tensor.name: tensor for tensor in (*inputs, *outputs)}
        self._inputs = [tensor.name for tensor in inputs]
        self._runtime = trt.Runtime(logger)  # must outlive the engine
        self.engine = self._runtime.deserialize_cuda_engine(serialized)
        if self.engine is None:
            raise EngineError("TensorRT cannot read the plan that it just built; its log says why.")
        self._context = self.engine.create_execution_context()
        if self._context is None:
            raise EngineError(
                "TensorRT cannot run the plan: most likely, the GPU's memory is full. Stop other "
                "programs on the GPU, or export with a smaller maximum batch."
            )
        self._tensors: dict[str, torch.Tensor] = {}

    def check_interface(self, plan: EnginePlan) -> None:
        """Check the plan's inputs, outputs and profile against the manifest.

        Raises:
            EngineError: a name, a direction, a type or the profile differs.
        """
        trt, engine = self._trt, self.engine
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        if names != set(self._specs):
            raise EngineError(
                f"the plan has the tensors {sorted(names)}, expected {sorted(self._specs)}"
            )
        for name, spec in self._specs.items():
            mode = trt.TensorIOMode.INPUT if name in self._inputs else trt.TensorIOMode.OUTPUT
            dtype = getattr(trt.DataType, _TENSORRT_TYPES[spec.dtype])
            found = engine.get_tensor_mode(name), engine.get_tensor_dtype(name)
            if found != (mode, dtype):
                raise EngineError(f"{name} is {found} in the plan, expected {(mode, dtype)}")
        for name in self._inputs:
            sizes = (plan.batch.min, plan.batch.opt, plan.batch.max)
            expected = [_with_batch(self._specs[name], size) for size in sizes]
            shapes = [tuple(shape) for shape in engine.get_tensor_profile_shape(name, 0)]
            if shapes != expected:
                raise EngineError(f"the profile of {name} is {shapes}, expected {expected}")

    def set_batch(self, size: int) -> None:
        """Allocate the plan's memory for batches of `size`.

        Raises:
            EngineError: the plan refuses the batch, or its outputs have another shape.
        """
        self._tensors = {
            name: self._gpu.empty(_with_batch(spec, size), _TORCH_TYPES[spec.dtype])
            for name, spec in self._specs.items()
        }
        for name, tensor in self._tensors.items():
            shape = tuple(tensor.shape)
            if name in self._inputs and not self._context.set_input_shape(name, shape):
                raise EngineError(f"the plan refuses {name} of shape {shape}")
            if not self._context.set_tensor_address(name, tensor.data_ptr()):
                raise EngineError(f"the plan refuses the memory for {name}")
        for name, tensor in self._tensors.items():
            found = tuple(self._context.get_tensor_shape(name))
            if found != tuple(tensor.shape):
                raise EngineError(f"{name} is {found} in the plan, expected {tuple(tensor.shape)}")

    def enqueue(self) -> None:
        """Start one inference on the stream.

        Raises:
            EngineError: TensorRT reports a failure.
        """
        if not self._context.execute_async_v3(self._gpu.stream_handle):
            raise EngineError("TensorRT failed to run the plan; its log above says why.")

    def tensor(self, name: str) -> torch.Tensor:
        """The memory of an input or output at the current batch size."""
        return self._tensors[name]

    def answer(self, images: NDArray[np.uint8]) -> Answers:
        """Run all images in batches of the current size; the last batch is padded."""
        image = self._tensors[self._inputs[0]]
        size = image.shape[0]
        parts: list[Outputs] = []
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            filled = np.resize(batch, (size, *batch.shape[1:]))
            image.copy_(torch.from_numpy(filled))
            self._gpu.synchronize()
            self.enqueue()
            self._gpu.synchronize()
            parts.append(
                {
                    name: tensor[: len(batch)].cpu().numpy().copy()
                    for name, tensor in self._tensors.items()
                    if name not in self._inputs
                }
            )
        return Answers.joined(parts)


def measure_latency(gpu: Gpu, run: Callable[[], None]) -> Latency:
    """Time a call from its submission until the device has finished."""
    for _ in range(WARM_UP_RUNS):
        run()
    gpu.synchronize()
    times_ms = []
    for _ in range(MEASURED_RUNS):
        start = time.perf_counter()
        run()
        gpu.synchronize()
        times_ms.append((time.perf_counter() - start) * 1_000)
    p50, p99 = np.percentile(times_ms, [50, 99])
    return Latency(p50_ms=float(p50), p99_ms=float(p99))


def count_fused_attention(trt: ModuleType, engine: Any) -> int:
    """Count the plan's layers that compute a whole attention in one kernel."""
    inspector = engine.create_engine_inspector()
    layers = [
        inspector.get_layer_information(index, trt.LayerInformationFormat.JSON)
        for index in range(engine.num_layers)
    ]
    return sum(bool(_FUSED_ATTENTION.search(_kernel(layer))) for layer in layers)


def count_attention(path: Path) -> int:
    """Count a graph's attentions: Attention operators, and softmaxes that feed a product."""
    graph = ModelGraph(onnx.load(str(path), load_external_data=False))

    def feeds_a_product(index: int) -> bool:
        return any(
            graph.nodes[child].op_type == "MatMul"
            or (graph.nodes[child].op_type == "Cast" and feeds_a_product(child))
            for child in graph.children(index)
        )

    return sum(
        node.op_type == "Attention" or (node.op_type == "Softmax" and feeds_a_product(index))
        for index, node in enumerate(graph.nodes)
    )


def _with_batch(spec: TensorSpec, size: int) -> tuple[int, ...]:
    return (size, *spec.shape[1:])


def _kernel(layer: str) -> str:
    """A layer's name and tactic. Its metadata only repeat names of ONNX nodes."""
    try:
        information = json.loads(layer)
    except json.JSONDecodeError:
        return layer
    if not isinstance(information, dict):
        return str(information)
    return f"{information.get('Name', '')} {information.get('TacticName', '')}"
