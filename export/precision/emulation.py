"""Emulates a GPU's half precision on the CPU: each node runs in float32, then rounds its result.

ONNX Runtime's CPU backend fuses neighbouring half precision nodes in float32 and drops the rounding
between them (microsoft/onnxruntime issue 8787). So it hides overflows and lost digits. It does not
run bfloat16 at all. Here, every node runs by itself, and its result is rounded to the type that the
graph declares. Sums inside a node stay in float32, as in GPU kernels. Softmax and GELU round once,
at their end.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.utils import Extractor

from export.graph.nodes import ModelGraph

Array = NDArray[Any]

_HALF = {TensorProto.FLOAT16: torch.float16, TensorProto.BFLOAT16: torch.bfloat16}
_MOVING = {"Concat", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators that only move or copy values."""
_LARGE = 1_000_000
"""Number of values above which a node gets several threads."""


@dataclass(frozen=True)
class Emulated:
    """The graph's outputs, and the number of NaN or infinite values per block."""

    outputs: dict[str, Array]
    nonfinite: dict[str, int] = field(default_factory=dict)
    """Number of NaN and infinite values, for blocks that have any."""


class HalfEmulator:
    """Runs a half precision model node by node."""

    def __init__(self, model: ModelProto) -> None:
        """Prepare a model from `convert_to_half`, which declares the type of each tensor."""
        self._graph = ModelGraph(model)
        self._types = self._graph.types
        self._constants = {
            entry.name: _to_array(entry) for entry in self._graph.initializers.values()
        }
        self._tail = self._graph.tail()
        self._tail_inputs, self._tail_outputs = self._edges_of_tail()
        # Resampling and all nodes after it are float32, so they run unchanged, in one session.
        part = Extractor(model).extract_model(self._tail_inputs, self._tail_outputs)
        self._tail_session = onnxruntime.InferenceSession(part.SerializeToString(), _options())

    def run(self, image: NDArray[np.uint8]) -> Emulated:
        """Run the model on a batch (B, H, W, 3) uint8."""
        (image_name,) = self._graph.inputs
        values: dict[str, Array] = {image_name: image}
        uses = Counter(
            name
            for index, node in enumerate(self._graph.nodes)
            if index not in self._tail
            for name in node.input
        )
        uses.update(self._tail_inputs)
        nonfinite: Counter[str] = Counter()
        for index, node in enumerate(self._graph.nodes):
            if index in self._tail:
                continue
            for name, result in zip(node.output, self._evaluate(node, values), strict=True):
                values[name] = result
                if result.dtype.kind == "f":
                    nonfinite[self._graph.blocks[index]] += _count_nonfinite(result)
            for name in node.input:
                uses[name] -= 1
                if not uses[name]:
                    values.pop(name, None)
        feeds = {name: values[name] for name in self._tail_inputs}
        answers = self._tail_session.run(self._tail_outputs, feeds)
        outputs = dict(zip(self._tail_outputs, answers, strict=True))
        return Emulated(outputs, {block: count for block, count in nonfinite.items() if count})

    def _evaluate(self, node: NodeProto, values: dict[str, Array]) -> list[Array]:
        inputs = {
            name: values[name] if name in values else self._constants[name]
            for name in dict.fromkeys(node.input)
            if name
        }
        if node.op_type == "Cast" and self._types.get(node.output[0]) in (
            *_HALF,
            TensorProto.FLOAT,
        ):
            results = [next(iter(inputs.values())).astype(np.float32)]
        else:
            results = _run_alone(node, inputs, self._graph.opset)
        if node.op_type in _MOVING:  # already rounded
            return results
        return [
            self._round(result, name) for name, result in zip(node.output, results, strict=True)
        ]

    def _round(self, result: Array, name: str) -> Array:
        half = _HALF.get(self._types.get(name, TensorProto.UNDEFINED))
        if half is not None:
            # Rounds in place with torch, which uses all cores. At full size, rounding takes as
            # long as the nodes themselves.
            values = torch.from_numpy(result)
            values.copy_(values.to(half))
        return result

    def _edges_of_tail(self) -> tuple[list[str], list[str]]:
        taken = dict.fromkeys(
            name
            for index in sorted(self._tail)
            for name in self._graph.nodes[index].input
            if name and name not in self._constants and self._graph.producer[name] not in self._tail
        )
        return list(taken), [
            name for name in self._graph.outputs if self._graph.producer[name] in self._tail
        ]


def _count_nonfinite(values: Array) -> int:
    if not values.size:
        return 0
    low, high = torch.aminmax(torch.from_numpy(values))  # NaN if any value is NaN
    if torch.isfinite(low) and torch.isfinite(high):
        return 0
    return int((~np.isfinite(values)).sum())


def _to_array(entry: TensorProto) -> Array:
    array = numpy_helper.to_array(entry)
    return array.astype(np.float32) if entry.data_type in _HALF else array


def _run_alone(node: NodeProto, inputs: dict[str, Array], opset: int) -> list[Array]:
    def info(name: str, array: Array | None) -> Any:
        kind = TensorProto.UNDEFINED
        if array is not None:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        return helper.make_tensor_value_info(name, kind, None)

    graph = helper.make_graph(
        [node],
        "node",
        [info(name, array) for name, array in inputs.items()],
        [helper.make_empty_tensor_value_info(name) for name in node.output],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    is_large = any(array.size >= _LARGE for array in inputs.values())
    options = _options(num_threads=0 if is_large else 1)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return list(session.run(None, inputs))


def _options(num_threads: int = 0) -> onnxruntime.SessionOptions:
    """Quiet options with `num_threads` threads; 0 means one per core."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = num_threads
    return options
