from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.tensorrt.lint import Violation, engine_obstacles, lint
from export.tensorrt.rules import load_rules

FLOAT, HALF, DOUBLE = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE
UINT8, INT64 = TensorProto.UINT8, TensorProto.INT64
node = helper.make_node


def _model(
    *nodes: onnx.NodeProto,
    input_type: int = FLOAT,
    output_type: int = FLOAT,
    input_shape: tuple[str | int, ...] = ("batch", 4, 8, 8),
    output_shape: tuple[str | int, ...] | None = None,
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 20,
    opset_domain: str = "",
) -> onnx.ModelProto:
    """A model from `x` to `y`; each node gets its operator's name."""
    for entry in nodes:
        entry.name = entry.name or f"the_{entry.op_type}"
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", input_type, input_shape)],
        [helper.make_tensor_value_info("y", output_type, output_shape or ("batch",))],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    imports = [helper.make_opsetid(domain, opset) for domain in {"", opset_domain}]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def _only(model: onnx.ModelProto) -> Violation:
    violations = lint(model)
    assert len(violations) == 1, list(map(str, violations))
    return violations[0]


def _axes(*values: int) -> dict[str, np.ndarray]:
    return {"axes": np.array(values, np.int64)}


def test_a_plain_graph_is_clean() -> None:
    assert lint(_model(node("Relu", ["x"], ["y"]))) == []


def test_a_violation_names_the_node_the_fix_and_the_rule() -> None:
    violation = _only(_model(node("NonZero", ["x"], ["y"]), output_type=INT64))
    assert str(violation).startswith("the_NonZero: operator NonZero is not in the list")
    assert "rules.json" in violation.fix
    assert str(violation).endswith("[operator]")


def test_a_node_without_a_name_is_named_by_its_outputs() -> None:
    model = _model(node("Det", ["x"], ["y"]))
    model.graph.node[0].name = ""
    assert _only(model).node == "Det -> y"


def test_an_operator_of_another_domain_is_refused() -> None:
    model = _model(
        node("FusedMatMul", ["x", "x"], ["y"], domain="com.microsoft"),
        opset_domain="com.microsoft",
    )
    assert "com.microsoft.FusedMatMul" in _only(model).message


@pytest.mark.parametrize("opset", [8, 25])
def test_an_opset_out_of_range_is_refused(opset: int) -> None:
    assert _only(_model(node("Relu", ["x"], ["y"]), opset=opset)).rule == "opset"


class TestUint8:
    def test_a_cast_at_each_edge_is_clean(self) -> None:
        model = _model(
            node("Cast", ["x"], ["float"], to=FLOAT),
            node("Relu", ["float"], ["result"]),
            node("Cast", ["result"], ["y"], to=UINT8, name="out"),
            input_type=UINT8,
            output_type=UINT8,
        )
        assert lint(model) == []

    def test_an_operator_before_the_cast_is_refused(self) -> None:
        model = _model(
            node("Transpose", ["x"], ["turned"], perm=[0, 3, 1, 2]),
            node("Cast", ["turned"], ["y"], to=FLOAT),
            input_type=UINT8,
        )
        assert {(v.rule, v.node) for v in lint(model)} == {("uint8", "the_Transpose")}

    def test_the_shape_of_a_byte_input_is_refused(self) -> None:
        model = _model(
            node("Shape", ["x"], ["shape"]),
            node("ConstantOfShape", ["shape"], ["y"]),
            input_type=UINT8,
        )
        assert "Let Shape take the Cast's output" in _only(model).fix

    def test_a_cast_from_an_integer_is_refused(self) -> None:
        model = _model(
            node("ArgMax", ["x"], ["labels"], axis=1),
            node("Cast", ["labels"], ["y"], to=UINT8),
            output_type=UINT8,
        )
        violation = _only(model)
        assert violation.node == "the_Cast"
        assert "Cast to float32, then to uint8" in violation.fix

    def test_a_cast_to_bfloat16_is_refused(self) -> None:
        model = _model(
            node("Cast", ["x"], ["y"], to=TensorProto.BFLOAT16),
            input_type=UINT8,
            output_type=TensorProto.BFLOAT16,
        )
        assert _only(model).rule == "uint8"

    def test_a_constant_of_bytes_is_refused(self) -> None:
        model = _model(
            node("Cast", ["bytes"], ["float"], to=FLOAT),
            node("Mul", ["x", "float"], ["y"]),
            constants={"bytes": np.ones(1, np.uint8)},
        )
        assert _only(model).node == "constant bytes"


class TestTypes:
    def test_float64_is_refused(self) -> None:
        model = _model(
            node("Cast", ["x"], ["wide"], to=DOUBLE),
            node("Relu", ["wide"], ["relu"]),
            node("Cast", ["relu"], ["y"], to=FLOAT, name="back"),
        )
        assert [(v.rule, v.node) for v in lint(model)] == [
            ("float64", "the_Relu"),
            ("float64", "the_Cast"),
        ]

    def test_int16_is_refused(self) -> None:
        model = _model(
            node("Cast", ["x"], ["y"], to=TensorProto.INT16), output_type=TensorProto.INT16
        )
        assert _only(model).rule == "tensor type"

    def test_a_type_that_an_operator_does_not_take_is_refused(self) -> None:
        model = _model(node("Softmax", ["x"], ["y"]), input_type=INT64, output_type=INT64)
        assert _only(model).message.startswith("Softmax of INT64, expected FLOAT")

    def test_mixed_types_are_refused(self) -> None:
        model = _model(node("Add", ["x", "c"], ["y"]), constants={"c": np.ones(1, np.float16)})
        violation = _only(model)
        assert violation.message == "Add mixes FLOAT and FLOAT16"
        assert violation.node == "the_Add"

    def test_a_norm_with_weights_of_another_type_is_refused(self) -> None:
        model = _model(
            node("LayerNormalization", ["x", "scale"], ["y"]),
            input_type=HALF,
            output_type=HALF,
            constants={"scale": np.ones(8, np.float32)},
        )
        assert _only(model).rule == "mixed types"

    def test_a_selection_by_a_boolean_is_not_mixed(self) -> None:
        model = _model(
            node("Greater", ["x", "c"], ["positive"]),
            node("Where", ["positive", "x", "c"], ["y"]),
            constants={"c": np.zeros(1, np.float32)},
        )
        assert lint(model) == []


class TestConstants:
    @pytest.mark.parametrize("operator", ["ReduceMean", "ReduceMax", "Squeeze", "Unsqueeze"])
    def test_constant_axes_are_clean(self, operator: str) -> None:
        shape = ("batch", 1, 8, 8) if operator == "Squeeze" else ("batch", 4, 8, 8)
        model = _model(node(operator, ["x", "axes"], ["y"]), constants=_axes(1), input_shape=shape)
        assert lint(model) == []

    def test_axes_of_a_constant_node_are_clean(self) -> None:
        axes = numpy_helper.from_array(np.array([1], np.int64))
        model = _model(
            node("Constant", [], ["axes"], value=axes), node("ReduceMean", ["x", "axes"], ["y"])
        )
        assert lint(model) == []

    @pytest.mark.parametrize("operator", ["ReduceMean", "Squeeze", "Unsqueeze"])
    def test_computed_axes_are_refused(self, operator: str) -> None:
        model = _model(
            node("Add", ["one", "one"], ["axes"]),
            node(operator, ["x", "axes"], ["y"]),
            constants={"one": np.ones(1, np.int64)},
        )
        violation = _only(model)
        assert (violation.rule, violation.node) == ("constant", f"the_{operator}")

    @pytest.mark.parametrize(("largest", "clean"), [(3839, True), (3840, False)])
    def test_top_k_stays_below_3840(self, largest: int, clean: bool) -> None:
        model = _model(
            node("TopK", ["x", "k"], ["y", ""]),
            input_shape=("batch", 5000),
            constants={"k": np.array([largest], np.int64)},
        )
        assert (lint(model) == []) is clean

    def test_an_asymmetric_quantisation_is_refused(self) -> None:
        model = _model(
            node("QuantizeLinear", ["x", "scale", "zero"], ["y"]),
            output_type=TensorProto.INT8,
            constants={"scale": np.float32(1).reshape(()), "zero": np.array(3, np.int8)},
        )
        assert "zero point" in _only(model).message


class TestAttributes:
    def _resize(self, **attributes: object) -> onnx.ModelProto:
        scales = np.array([1, 1, 4, 4], np.float32)
        resize = node("Resize", ["x", "", "scales"], ["y"], **attributes)
        return _model(resize, constants={"scales": scales})

    def test_a_linear_resize_is_clean(self) -> None:
        assert lint(self._resize(mode="linear", antialias=0)) == []

    @pytest.mark.parametrize(
        "attributes",
        [
            {"mode": "cubic"},
            {"mode": "linear", "antialias": 1},
            {"mode": "linear", "coordinate_transformation_mode": "half_pixel_symmetric"},
            {"mode": "linear", "keep_aspect_ratio_policy": "not_larger"},
        ],
    )
    def test_any_other_resize_is_refused(self, attributes: dict[str, object]) -> None:
        violation = _only(self._resize(**attributes))
        assert (violation.rule, violation.node) == ("attribute", "the_Resize")

    def test_a_dilated_pool_is_refused(self) -> None:
        pool = node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], dilations=[1, 2])
        assert "dilations = 1, 2" in _only(_model(pool)).message

    def test_the_indices_of_a_pool_are_refused(self) -> None:
        pool = node("MaxPool", ["x"], ["y", "indices"], kernel_shape=[2, 2])
        assert _only(_model(pool)).rule == "output"

    def test_attention_over_three_dimensions_is_refused(self) -> None:
        attention = node("Attention", ["x", "x", "x"], ["y"], q_num_heads=2, kv_num_heads=2)
        model = _model(attention, input_shape=("batch", 16, 8), opset=23)
        assert {(v.rule, v.fix) for v in lint(model)} == {("input", "Reshape it to rank 4.")}

    def test_attention_over_four_dimensions_is_clean(self) -> None:
        attention = node("Attention", ["x", "x", "x"], ["y"])
        assert lint(_model(attention, opset=23)) == []

    def test_attention_with_a_past_is_refused(self) -> None:
        attention = node("Attention", ["x", "x", "x", "", "x", "x"], ["y"])
        rules = [violation.rule for violation in lint(_model(attention, opset=23))]
        assert rules == ["input", "input"]


class TestDynamicDimensions:
    def test_a_dynamic_height_is_refused(self) -> None:
        model = _model(node("Relu", ["x"], ["y"]), input_shape=("batch", "height", 8, 8))
        violation = _only(model)
        assert (violation.rule, violation.node) == ("dynamic", "input x")
        assert violation.message == "dimension 1 of x is dynamic"

    def test_a_fixed_batch_is_refused(self) -> None:
        model = _model(node("Relu", ["x"], ["y"]), input_shape=(1, 4), output_shape=(1, 4))
        assert "batch of inputs and outputs is 1" in _only(model).message

    def test_two_names_for_the_batch_are_refused(self) -> None:
        model = _model(node("Relu", ["x"], ["y"]), output_shape=("other", 4, 8, 8))
        assert "batch, other" in _only(model).message


class TestBundle:
    def test_the_toy_graph_is_clean_but_for_its_integer_labels(self, toy_bundle: Path) -> None:
        violation = _only(onnx.load(toy_bundle / "model.onnx"))
        assert (violation.rule, violation.node) == ("uint8", "Cast -> labels")

    def test_what_a_file_breaks_is_named_with_its_fix(self, toy_bundle: Path) -> None:
        (obstacle,) = engine_obstacles(toy_bundle / "model.onnx")
        assert "Cast -> labels" in obstacle
        assert "Cast to float32" in obstacle

    def test_a_clean_file_has_no_obstacle(self, tmp_path: Path) -> None:
        onnx.save(_model(node("Relu", ["x"], ["y"])), tmp_path / "model.onnx")
        assert engine_obstacles(tmp_path / "model.onnx") == ()


def test_the_rules_cite_their_source_and_version() -> None:
    rules = load_rules()
    assert rules.tensorrt_version == "10.15"
    assert "onnx-tensorrt" in rules.source


def test_each_operator_of_the_rules_is_one_of_onnx() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    assert set(load_rules().operators) <= known


def test_each_type_of_the_rules_is_one_of_onnx() -> None:
    rules = load_rules()
    known = set(TensorProto.DataType.keys())
    assert {name for names in rules.type_sets.values() for name in names} <= known
    assert {operator.types for operator in rules.operators.values()} <= set(rules.type_sets)
