"""Converts a graph to strongly typed half precision, with float32 where half is not safe.

Neither ONNX nor TensorRT's strongly typed networks cast implicitly. Every node has one floating
point type, and an explicit Cast marks every change. These parts stay in float32:

- nodes that do not depend on the pixels, and the normalisation of the image;
- layer norms, whose squares overflow float16 (the classic silent failure of ViT engines);
- all nodes after the upscaling and after the last norm of the tokens: class weights, logits,
  softmax and labels;
- blocks named as islands, because their activations are too large or too sensitive.

The softmax of an attention has the type of its products, so that a runtime can fuse all three.
Fused kernels compute it in float32. The graph's structure identifies nodes; the exporter's module
names identify blocks. The converters of onnxconverter-common and ONNX Runtime support neither
islands by module nor bfloat16 graphs, so this module has its own.
"""

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.errors import SettingsError
from export.graph.nodes import NORMS, ModelGraph, flat_graph

HalfPrecision = Literal["fp16", "bf16"]

FLOAT16_MAX = 65_504.0

_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_TYPE_NAMES = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}

_PRODUCTS = {"Attention", "Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"}
_STATISTICS = {"ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2"}
_ELEMENTWISE = {"Add", "Div", "Mul", "Pow", "Reciprocal", "Sqrt", "Sub", "Cast"} | _STATISTICS


def half_blocks(model: ModelProto, precision: HalfPrecision = "fp16") -> tuple[str, ...]:
    """The blocks that half precision would affect, in graph order: the possible islands."""
    graph = flat_graph(model)
    in_half = _nodes_in_half(graph, precision, frozenset())
    return tuple(dict.fromkeys(graph.blocks[index] for index in sorted(in_half)))


def constants_beyond(model: ModelProto) -> dict[str, str]:
    """For each block with a constant that is too large for float16, the reason."""
    graph = flat_graph(model)
    in_half = _nodes_in_half(graph, "fp16", frozenset())
    reasons: dict[str, str] = {}
    for entry in model.graph.initializer:
        largest = _largest(numpy_helper.to_array(entry)) if _is_float(entry) else 0.0
        if largest > FLOAT16_MAX:
            for index in in_half.intersection(graph.consumers[entry.name]):
                reasons[graph.blocks[index]] = (
                    f"{graph.blocks[index]} has the constant {entry.name}, which reaches "
                    f"{largest:.3g}; float16 ends at {FLOAT16_MAX:,.0f}"
                )
    return reasons


def convert_to_half(
    model: ModelProto, precision: HalfPrecision, islands: Iterable[str] = ()
) -> ModelProto:
    """Copy a float32 model as a strongly typed model in half precision.

    Args:
        model: a valid model with float32 outputs, as `export_onnx` writes it.
        precision: fp16 or bf16. Operators without bfloat16 in the model's opset stay in float32.
        islands: blocks that stay in float32, named as in `half_blocks`.

    Raises:
        SettingsError: an island is not a block of the model, a weight exceeds float16's range, or
            no node would be in half precision.
    """
    graph = flat_graph(model)
    islands = frozenset(islands)
    known = half_blocks(model, precision)
    unknown = sorted(islands - set(known))
    if unknown:
        raise SettingsError(
            f"no block is named {', '.join(unknown)}; expected some of {', '.join(known)}"
        )
    in_half = _nodes_in_half(graph, precision, islands)
    if not in_half:
        raise SettingsError(
            f"every block is a float32 island, so {precision} would change nothing. Name fewer "
            f"islands, or leave {precision} out."
        )
    return _Conversion(model, graph, precision, in_half).run()


def _nodes_in_half(
    graph: ModelGraph, precision: HalfPrecision, islands: frozenset[str]
) -> set[int]:
    pixels = graph.after_pixels()
    products = [i for i in pixels if graph.nodes[i].op_type in _PRODUCTS]
    statistics = [i for i in pixels if graph.nodes[i].op_type in _STATISTICS]
    norms = {i for i in pixels if graph.nodes[i].op_type in NORMS}
    norms |= graph.descendants(statistics, _ELEMENTWISE)
    outputs = {graph.producer[name] for name in graph.outputs if name in graph.producer}
    candidates = graph.descendants(products) - norms - graph.tail() - outputs
    return {
        index
        for index in candidates
        if graph.blocks[index] not in islands and _takes(graph, index, precision)
    }


def _takes(graph: ModelGraph, index: int, precision: HalfPrecision) -> bool:
    """Whether the operator supports the type; many support bfloat16 only from opset 22 on."""
    node = graph.nodes[index]
    if node.op_type == "Cast":
        return False
    schema = onnx.defs.get_schema(node.op_type, graph.opset, node.domain)
    variable = {entry.type_param_str: entry.allowed_type_strs for entry in schema.type_constraints}
    first = variable.get(schema.inputs[0].type_str, ()) if schema.inputs else ()
    return "tensor(float)" in first and _TYPE_NAMES[precision] in first


class _Conversion:
    """One pass over the nodes in order, which casts inputs of another type."""

    def __init__(
        self, model: ModelProto, graph: ModelGraph, precision: HalfPrecision, in_half: set[int]
    ) -> None:
        self._model, self._graph, self._precision = model, graph, precision
        self._in_half = in_half
        self._half = _TYPES[precision]
        inferred = ModelGraph(onnx.shape_inference.infer_shapes(model, strict_mode=True))
        # The type of each float tensor in the new graph.
        self._types: dict[str, int] = {
            name: TensorProto.FLOAT
            for name, found in inferred.types.items()
            if found == TensorProto.FLOAT and name not in inferred.initializers
        }
        self._constants = {
            entry.name: entry for entry in model.graph.initializer if _is_float(entry)
        }
        self._casts: dict[tuple[str, int], str] = {}
        self._nodes: list[NodeProto] = []

    def run(self) -> ModelProto:
        self._convert_constants()
        for index, node in enumerate(self._graph.nodes):
            self._convert(index, node)
        converted = ModelProto()
        converted.CopyFrom(self._model)
        del converted.graph.node[:], converted.graph.value_info[:], converted.graph.initializer[:]
        converted.graph.node.extend(self._nodes)
        others = (entry for entry in self._model.graph.initializer if not _is_float(entry))
        converted.graph.initializer.extend([*others, *self._constants.values()])
        converted = onnx.shape_inference.infer_shapes(converted, check_type=True, strict_mode=True)
        onnx.checker.check_model(converted, full_check=True)
        return converted

    def _convert(self, index: int, node: NodeProto) -> None:
        to_half = index in self._in_half
        converted = NodeProto()
        converted.CopyFrom(node)
        if node.op_type != "Cast":
            wanted = self._half if to_half else TensorProto.FLOAT
            converted.input[:] = [
                self._as_type(name, wanted if _is_generic(node, place, self._graph.opset) else None)
                for place, name in enumerate(node.input)
            ]
        self._nodes.append(converted)
        if to_half:
            self._types |= {name: self._half for name in node.output if name in self._types}

    def _as_type(self, name: str, wanted: int | None) -> str:
        """The name of a tensor in the wanted type; adds a Cast if there is none yet."""
        if name in self._constants:
            other = f"{name}_{self._precision}"
            return other if wanted == self._half and other in self._constants else name
        found = self._types.get(name)
        if found is None or wanted is None or found == wanted:
            return name
        key = (name, wanted)
        if key not in self._casts:
            self._casts[key] = f"{name}_as_{'fp32' if wanted != self._half else self._precision}"
            cast = helper.make_node("Cast", [name], [self._casts[key]], to=wanted)
            cast.name = f"cast_{self._casts[key]}"
            cast.metadata_props.extend(self._graph.nodes[self._graph.producer[name]].metadata_props)
            self._nodes.append(cast)
        return self._casts[key]

    def _convert_constants(self) -> None:
        """Store each constant in the types that its nodes need; one type alone keeps its name."""
        for name, entry in list(self._constants.items()):
            uses = {
                index in self._in_half and _is_generic(self._graph.nodes[index], place, opset)
                for opset in [self._graph.opset]
                for index in self._graph.consumers[name]
                for place, taken in enumerate(self._graph.nodes[index].input)
                if taken == name
            }
            if True not in uses:
                continue
            new_name = f"{name}_{self._precision}" if False in uses else name
            values = self._rounded(numpy_helper.to_array(entry), name)
            self._constants[new_name] = numpy_helper.from_array(values, new_name)

    def _rounded(self, values: NDArray[Any], name: str) -> NDArray[Any]:
        largest = _largest(values)
        if self._precision == "fp16" and largest > FLOAT16_MAX:
            user = next(i for i in self._graph.consumers[name] if i in self._in_half)
            raise SettingsError(
                f"the constant {name} reaches {largest:.3g}; float16 ends at {FLOAT16_MAX:,.0f}. "
                f"Keep its block in float32: --fp32-islands {self._graph.blocks[user]}"
            )
        return values.astype(helper.tensor_dtype_to_np_dtype(self._half))


def _is_float(entry: TensorProto) -> bool:
    return bool(entry.data_type == TensorProto.FLOAT)


def _largest(values: NDArray[Any]) -> float:
    return float(np.abs(values).max(initial=0.0))


def _is_generic(node: NodeProto, place: int, opset: int) -> bool:
    """Whether an input has the node's type. Resize's scales, for example, are always float32."""
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    formal = schema.inputs[min(place, len(schema.inputs) - 1)]
    return formal.type_str in {entry.type_param_str for entry in schema.type_constraints}
