from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from export.tensorrt.lint import engine_obstacles, lint
from export.tensorrt.rules import load_rules

IMAGE = "float[batch,4,8,8]"


def _model(nodes: str, x: str = IMAGE, y: str = "float[batch]", opset: int = 20) -> onnx.ModelProto:
    """A model from `x` to `y` in ONNX's own notation; each node gets its operator's name."""
    imports = f'"": {opset}, "com.microsoft": 1'
    constants, _, nodes = nodes.rpartition(";")
    model: onnx.ModelProto = onnx.parser.parse_model(
        f"<ir_version: 10, opset_import: [{imports}]>"
        f"test ({x} x) => ({y} y) <{constants}> {{ {nodes} }}"
    )
    for node in model.graph.node:
        node.name = f"the_{node.op_type}"
    return model


CLEAN = {
    "plain": _model("y = Relu (x)"),
    "uint8 with a cast at each edge": _model(
        "float = Cast <to = 1> (x) result = Relu (float) y = Cast <to = 2> (result)",
        x="uint8[batch,4,8,8]",
        y="uint8[batch]",
    ),
    "a selection by a boolean is not mixed": _model(
        "float[1] c = {0}; positive = Greater (x, c) y = Where (positive, x, c)"
    ),
    "constant axes of a mean": _model("int64[1] axes = {1}; y = ReduceMean (x, axes)"),
    "constant axes of a maximum": _model("int64[1] axes = {1}; y = ReduceMax (x, axes)"),
    "constant axes of Unsqueeze": _model("int64[1] axes = {1}; y = Unsqueeze (x, axes)"),
    "constant axes of Squeeze": _model(
        "int64[1] axes = {1}; y = Squeeze (x, axes)", x="float[batch,1,8,8]"
    ),
    "axes of a Constant node": _model(
        "axes = Constant <value = int64[1] {1}> () y = ReduceMean (x, axes)"
    ),
    "the largest TopK": _model(
        "int64[1] k = {3839}; y, indices = TopK (x, k)", x="float[batch,5000]"
    ),
    "a linear resize": _model(
        'float[4] scales = {1, 1, 4, 4}; y = Resize <mode = "linear", antialias = 0> (x, , scales)'
    ),
    "attention over four dimensions": _model("y = Attention (x, x, x)", opset=23),
}


@pytest.mark.parametrize("name", CLEAN)
def test_what_tensorrts_parser_takes_is_clean(name: str) -> None:
    assert [str(violation) for violation in lint(CLEAN[name])] == []


def _resize(attributes: str) -> onnx.ModelProto:
    return _model(f"float[4] scales = {{1, 1, 4, 4}}; y = Resize <{attributes}> (x, , scales)")


ADDED = "int64[1] one = {1}; axes = Add (one, one)"
REFUSED = {
    "an unknown operator": (
        _model("y = NonZero (x)", y="int64[batch]"),
        "the_NonZero: operator NonZero is not in the list",
        "rules.json. [operator]",
    ),
    "an operator of another domain": (
        _model("y = com.microsoft.FusedMatMul (x, x)"),
        "the_FusedMatMul: operator com.microsoft.FusedMatMul",
        "[operator]",
    ),
    "an old opset": (_model("y = Relu (x)", opset=8), "model: opset 8, expected", "[opset]"),
    "a new opset": (_model("y = Relu (x)", opset=25), "model: opset 25, expected", "[opset]"),
    "a shape of bytes": (
        _model("shape = Shape (x) y = ConstantOfShape (shape)", x="uint8[batch,4]"),
        "the_Shape: ",
        "Let Shape take the Cast's output. [uint8]",
    ),
    "bytes from an integer": (
        _model("labels = ArgMax <axis = 1> (x) y = Cast <to = 2> (labels)", y="uint8[batch]"),
        "the_Cast: ",
        "Cast to float32, then to uint8. [uint8]",
    ),
    "bytes to bfloat16": (
        _model("y = Cast <to = 16> (x)", x="uint8[batch,4]", y="bfloat16[batch]"),
        "the_Cast: ",
        "[uint8]",
    ),
    "a constant of bytes": (
        _model("uint8[1] bytes = {1}; float = Cast <to = 1> (bytes) y = Mul (x, float)"),
        "constant bytes: ",
        "[uint8]",
    ),
    "int16": (
        _model("y = Cast <to = 5> (x)", y="int16[batch]"),
        "the_Cast: tensor y is INT16",
        "[tensor type]",
    ),
    "a type that an operator does not take": (
        _model("y = Softmax (x)", x="int64[batch,4]", y="int64[batch]"),
        "the_Softmax: Softmax of INT64, expected FLOAT",
        "[operator type]",
    ),
    "mixed types": (
        _model("float16[1] c = {1}; y = Add (x, c)"),
        "the_Add: Add mixes FLOAT and FLOAT16",
        "[mixed types]",
    ),
    "a norm with weights of another type": (
        _model(
            "float[8] scale = {1, 1, 1, 1, 1, 1, 1, 1}; y = LayerNormalization (x, scale)",
            x="float16[batch,4,8,8]",
            y="float16[batch]",
        ),
        "the_LayerNormalization: ",
        "[mixed types]",
    ),
    "computed axes of a mean": (
        _model(f"{ADDED} y = ReduceMean (x, axes)"),
        "the_ReduceMean: ReduceMean computes its input 1, axes",
        "[constant]",
    ),
    "computed axes of Squeeze": (
        _model(f"{ADDED} y = Squeeze (x, axes)"),
        "the_Squeeze: ",
        "[constant]",
    ),
    "computed axes of Unsqueeze": (
        _model(f"{ADDED} y = Unsqueeze (x, axes)"),
        "the_Unsqueeze: ",
        "[constant]",
    ),
    "a TopK that is too large": (
        _model("int64[1] k = {3840}; y, indices = TopK (x, k)", x="float[batch,5000]"),
        "the_TopK: TopK with an input 1 of 3840",
        "[constant]",
    ),
    "an asymmetric quantisation": (
        _model("float s = {1}, int8 zero = {3}; y = QuantizeLinear (x, s, zero)", y="int8[batch]"),
        "the_QuantizeLinear: QuantizeLinear has a zero point",
        "[constant]",
    ),
    "a cubic resize": (_resize('mode = "cubic"'), "the_Resize: ", "[attribute]"),
    "an antialiased resize": (
        _resize('mode = "linear", antialias = 1'),
        "the_Resize: Resize with antialias = 1",
        "[attribute]",
    ),
    "a resize between symmetric pixels": (
        _resize('mode = "linear", coordinate_transformation_mode = "half_pixel_symmetric"'),
        "the_Resize: ",
        "[attribute]",
    ),
    "a resize that keeps the aspect": (
        _resize('mode = "linear", keep_aspect_ratio_policy = "not_larger"'),
        "the_Resize: ",
        "[attribute]",
    ),
    "a resize of some axes": (
        _model("float[2] scales = {4, 4}; y = Resize <axes = [2, 3]> (x, , scales)"),
        "the_Resize: Resize has the attribute axes",
        "Leave it out. [attribute]",
    ),
    "a dilated pool": (
        _model("y = MaxPool <kernel_shape = [2, 2], dilations = [1, 2]> (x)"),
        "the_MaxPool: MaxPool with dilations = 1, 2",
        "[attribute]",
    ),
    "the indices of a pool": (
        _model("y, indices = MaxPool <kernel_shape = [2, 2]> (x)"),
        "the_MaxPool: MaxPool has 2 outputs",
        "[output]",
    ),
    "a dynamic height": (
        _model("y = Relu (x)", x="float[batch,height,8,8]"),
        "input x: dimension 1 of x is dynamic",
        "[dynamic]",
    ),
    "a fixed batch": (
        _model("y = Relu (x)", x="float[1,4]", y="float[1,4]"),
        "inputs and outputs: the batch of inputs and outputs is 1",
        "[dynamic]",
    ),
    "two names for the batch": (
        _model("y = Relu (x)", y="float[other,4,8,8]"),
        "inputs and outputs: the batch of inputs and outputs is batch, other",
        "[dynamic]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_parser_would_refuse_names_the_node_the_fix_and_the_rule(name: str) -> None:
    model, begin, end = REFUSED[name]
    (violation,) = lint(model)
    assert str(violation).startswith(begin)
    assert str(violation).endswith(end)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            _model(
                "turned = Transpose <perm = [0, 3, 1, 2]> (x) y = Cast <to = 1> (turned)",
                x="uint8[batch,4,8,8]",
            ),
            [("uint8", "the_Transpose")] * 2,
        ),
        (
            _model("wide = Cast <to = 11> (x) relu = Relu (wide) y = Cast <to = 1> (relu)"),
            [("float64", "the_Relu"), ("float64", "the_Cast")],
        ),
        (
            _model(
                "y = Attention <q_num_heads = 2, kv_num_heads = 2> (x, x, x)",
                x="float[batch,16,8]",
                opset=23,
            ),
            [("input", "the_Attention")] * 3,
        ),
        (_model("y = Attention (x, x, x, , x, x)", opset=23), [("input", "the_Attention")] * 2),
    ],
    ids=["an operator before the cast", "float64", "attention over three dimensions", "a past"],
)
def test_every_place_that_breaks_a_rule_is_listed(
    model: onnx.ModelProto, expected: list[tuple[str, str]]
) -> None:
    assert sorted((v.rule, v.node) for v in lint(model)) == sorted(expected)


def test_a_node_without_a_name_is_named_by_its_outputs() -> None:
    model = _model("y = Det (x)")
    model.graph.node[0].name = ""
    assert [violation.node for violation in lint(model)] == ["Det -> y"]


def test_what_a_file_breaks_is_named_with_its_fix(toy_bundle: Path) -> None:
    """The tests' toy computes its labels as integers."""
    (obstacle,) = engine_obstacles(toy_bundle / "model.onnx")
    assert "Cast -> labels" in obstacle
    assert "Cast to float32" in obstacle


def test_the_rules_name_operators_and_types_of_onnx_and_cite_their_source() -> None:
    rules = load_rules()
    assert rules.tensorrt_version == "10.15"
    assert "onnx-tensorrt" in rules.source
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    assert set(rules.operators) <= known
    types = set(TensorProto.DataType.keys())
    assert {name for names in rules.type_sets.values() for name in names} <= types
    assert {operator.types for operator in rules.operators.values()} <= set(rules.type_sets)
