"""A lint of an ONNX graph against the rules of TensorRT's parser.

`rules.json` holds the rules and cites their sources. A violation names the node and the fix, on a
machine without TensorRT, before a builder elsewhere would fail.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.graph.nodes import STANDARD_DOMAINS, ModelGraph
from export.tensorrt.rules import OperatorRule, Rules, load_rules


@dataclass(frozen=True)
class Violation:
    """A place where the graph breaks a rule."""

    rule: str
    node: str
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.node}: {self.message}. {self.fix} [{self.rule}]"


def lint(model: onnx.ModelProto) -> list[Violation]:
    """List where a model breaks the rules of TensorRT's parser.

    Skips tensors whose type ONNX cannot infer.
    """
    graph, rules = _LintedGraph(model), load_rules()
    return [violation for check in _CHECKS for violation in check(graph, rules)]


def engine_obstacles(path: Path) -> tuple[str, ...]:
    """List why TensorRT's parser would refuse a model file; empty if it would not."""
    return tuple(str(violation) for violation in lint(onnx.load(str(path))))


class _LintedGraph(ModelGraph):
    """A model without functions, with the types and ranks that ONNX infers."""

    def __init__(self, model: onnx.ModelProto) -> None:
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        super().__init__(onnx.shape_inference.infer_shapes(model))

    def type_of(self, tensor: str) -> str | None:
        """The type's ONNX name, or None if it is not known."""
        return TensorProto.DataType.Name(self.types[tensor]) if tensor in self.types else None

    def values(self, tensor: str) -> NDArray[Any]:
        """The values of a constant."""
        return np.asarray(numpy_helper.to_array(self.constants[tensor]))

    def takers(self, tensor: str) -> Iterator[onnx.NodeProto]:
        """The nodes that consume a tensor."""
        return (self.nodes[index] for index in self.consumers.get(tensor, ()))

    def maker(self, tensor: str) -> onnx.NodeProto | None:
        """The node that produces a tensor; None for inputs and initializers."""
        return self.nodes[self.producer[tensor]] if tensor in self.producer else None


def _name(node: onnx.NodeProto) -> str:
    return node.name or f"{node.op_type} -> {', '.join(node.output)}"


def _input(node: onnx.NodeProto, place: int) -> str:
    """The name of an input, empty if it is left out."""
    return str(node.input[place]) if place < len(node.input) else ""


def _check_opset(graph: _LintedGraph, rules: Rules) -> Iterator[Violation]:
    if not rules.opset.min <= graph.opset <= rules.opset.max:
        yield Violation(
            "opset",
            "model",
            f"opset {graph.opset}, expected {rules.opset.min} to {rules.opset.max}",
            "Export with --opset 20.",
        )


def _check_operators(graph: _LintedGraph, rules: Rules) -> Iterator[Violation]:
    for node in graph.nodes:
        if node.domain not in STANDARD_DOMAINS or node.op_type not in rules.operators:
            name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            yield Violation(
                "operator",
                _name(node),
                f"operator {name} is not in the list for TensorRT {rules.tensorrt_version}",
                "Write it with operators from rules.json.",
            )


def _check_types(graph: _LintedGraph, rules: Rules) -> Iterator[Violation]:
    """Find types that no tensor may have, and types that an operator does not support."""
    for tensor in sorted(graph.types):
        found = graph.type_of(tensor)
        if found not in rules.tensor_types:
            yield Violation(
                "float64" if found == "DOUBLE" else "tensor type",
                _place(graph, tensor),
                f"tensor {tensor} is {found}, expected one of {', '.join(rules.tensor_types)}",
                "Compute it in float32 (shapes and indices in int64).",
            )
    for node, rule in _ruled(graph, rules):
        found = graph.type_of(_input(node, 0))
        if found == "UINT8" or found not in rules.tensor_types:
            continue  # another rule reports it, or the type is not known
        if found not in rules.type_sets[rule.types]:
            yield Violation(
                "operator type",
                _name(node),
                f"{node.op_type} of {found}, expected {', '.join(rules.type_sets[rule.types])}",
                "Cast its input first.",
            )


def _check_uint8(graph: _LintedGraph, rules: Rules) -> Iterator[Violation]:
    """Allow uint8 only before a Cast of an input, and after a Cast to an output."""
    expected = " or ".join(rules.uint8_casts)
    for tensor in sorted(name for name in graph.types if graph.type_of(name) == "UINT8"):
        if tensor not in graph.inputs.union(graph.outputs):
            message = f"tensor {tensor} is UINT8 inside the graph"
            fix = "Use uint8 only for inputs and outputs; compute in float32."
            yield Violation("uint8", _place(graph, tensor), message, fix)
        for node in graph.takers(tensor):
            if node.op_type != "Cast" or graph.type_of(node.output[0]) not in rules.uint8_casts:
                message = f"{node.op_type} takes the UINT8 tensor {tensor}"
                fix = f"Only a Cast to {expected} may. Let {node.op_type} take the Cast's output."
                yield Violation("uint8", _name(node), message, fix)
        producer = graph.maker(tensor)
        if producer is None or tensor not in graph.outputs:
            continue
        source = graph.type_of(_input(producer, 0))
        if producer.op_type != "Cast" or source not in rules.uint8_casts:
            message = f"{producer.op_type} of {source} produces the UINT8 output {tensor}"
            fix = f"Only a Cast from {expected} may. Cast to float32, then to uint8."
            yield Violation("uint8", _name(producer), message, fix)


def _check_mixed_types(graph: _LintedGraph, rules: Rules) -> Iterator[Violation]:
    for node, rule in _ruled(graph, rules):
        places = range(len(node.input)) if rule.same_type == "all" else rule.same_type
        types = {graph.type_of(_input(node, place)) for place in places} - {None}
        if len(types) > 1:
            yield Violation(
                "mixed types",
                _name(node),
                f"{node.op_type} mixes {' and '.join(sorted(map(str, types)))}",
                "A strongly typed network has no implicit casts: add a Cast.",
            )


def _check_attributes(graph: _LintedGraph, rules: Rules) -> Iterator[Violation]:
    for node, rule in _ruled(graph, rules):
        for attribute in node.attribute:
            if attribute.name in rule.absent_attributes:
                message = f"{node.op_type} has the attribute {attribute.name}"
                yield Violation("attribute", _name(node), message, "Leave it out.")
            allowed = rule.attributes.get(attribute.name)
            if allowed is None:
                continue
            found = _values(helper.get_attribute_value(attribute))
            if not set(found) <= set(allowed):
                yield Violation(
                    "attribute",
                    _name(node),
                    f"{node.op_type} with {attribute.name} = {', '.join(map(str, found))}",
                    f"Use {' or '.join(map(str, allowed))}.",
                )


def _check_inputs(graph: _LintedGraph, rules: Rules) -> Iterator[Violation]:
    for node, rule in _ruled(graph, rules):
        for place in rule.absent_inputs:
            if _input(node, place):
                message = f"{node.op_type} has an input {place}, {_input(node, place)}"
                yield Violation(
                    "input", _name(node), message, "TensorRT does not support it: leave it out."
                )
        for place in range(3 if rule.rank else 0):
            rank = graph.ranks.get(_input(node, place), rule.rank)
            if rank != rule.rank:
                message = f"{node.op_type} has an input {place} of rank {rank}"
                yield Violation("input", _name(node), message, f"Reshape it to rank {rule.rank}.")
        if rule.max_outputs and sum(map(bool, node.output)) > rule.max_outputs:
            message = f"{node.op_type} has {len(node.output)} outputs"
            fix = f"TensorRT supports {rule.max_outputs}: do not use the others."
            yield Violation("output", _name(node), message, fix)


def _check_constants(graph: _LintedGraph, rules: Rules) -> Iterator[Violation]:
    for node, rule in _ruled(graph, rules):
        for place in rule.constant_inputs:
            if _input(node, place) and _input(node, place) not in graph.constants:
                message = f"{node.op_type} computes its input {place}, {_input(node, place)}"
                fix = "TensorRT needs its value at build time: use a constant."
                yield Violation("constant", _name(node), message, fix)
        for place in rule.zero_inputs:
            tensor = _input(node, place)
            if tensor in graph.constants and graph.values(tensor).any():
                message = f"{node.op_type} has a zero point that is not 0"
                yield Violation("constant", _name(node), message, "Quantise symmetrically.")
        below = rule.below
        if below and (tensor := _input(node, below.input)) in graph.constants:
            largest = int(graph.values(tensor).max())
            if largest >= below.limit:
                message = f"{node.op_type} with an input {below.input} of {largest}"
                yield Violation("constant", _name(node), message, f"Stay below {below.limit}.")


def _check_dynamic(graph: _LintedGraph, rules: Rules) -> Iterator[Violation]:
    """Allow one dynamic dimension: the batch, first in each input and output, with one name."""
    batches = set()
    for kind, infos in (("input", graph.input_infos), ("output", graph.output_infos)):
        for info in infos:
            dims = info.type.tensor_type.shape.dim
            if dims:
                batches.add(dims[0].dim_param or dims[0].dim_value or "?")
            fixed = [place for place, dim in enumerate(dims) if place and dim.dim_value < 1]
            if fixed:
                message = f"dimension {', '.join(map(str, fixed))} of {info.name} is dynamic"
                fix = "Export with a fixed tile size: only the batch may be dynamic."
                yield Violation("dynamic", f"{kind} {info.name}", message, fix)
    if len(batches) > 1 or any(isinstance(batch, int) for batch in batches):
        found = ", ".join(sorted(map(str, batches)))
        message = f"the batch of inputs and outputs is {found}"
        fix = "Give all of them the same dynamic batch, with one name."
        yield Violation("dynamic", "inputs and outputs", message, fix)


_CHECKS: tuple[Callable[[_LintedGraph, Rules], Iterator[Violation]], ...] = (
    _check_opset,
    _check_operators,
    _check_types,
    _check_uint8,
    _check_mixed_types,
    _check_attributes,
    _check_inputs,
    _check_constants,
    _check_dynamic,
)


def _ruled(graph: _LintedGraph, rules: Rules) -> Iterator[tuple[onnx.NodeProto, OperatorRule]]:
    for node in graph.nodes:
        if node.domain in STANDARD_DOMAINS and node.op_type in rules.operators:
            yield node, rules.operators[node.op_type]


def _place(graph: _LintedGraph, tensor: str) -> str:
    producer = graph.maker(tensor)
    if producer is not None:
        return _name(producer)
    return f"{'constant' if tensor in graph.constants else 'input'} {tensor}"


def _values(value: Any) -> tuple[str | int | float, ...]:
    items = value if isinstance(value, list | tuple) else [value]
    return tuple(item.decode() if isinstance(item, bytes) else item for item in items)
