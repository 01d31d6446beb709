from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from export.errors import GraphError, SettingsError
from export.graph.nodes import ModelGraph, block_of_module
from export.precision.half import constants_beyond, convert_to_half, half_blocks
from tests.support.errors import raises
from tests.support.half_graphs import FIRST, SECOND, UPSCALING, noted, two_blocks

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}


@pytest.fixture(scope="module")
def toy(toy_graph: Path) -> onnx.ModelProto:
    return onnx.load(str(toy_graph))


@pytest.fixture(scope="module")
def toy_half(toy: onnx.ModelProto) -> onnx.ModelProto:
    return convert_to_half(toy, "fp16")


def _types(model: onnx.ModelProto) -> dict[str, int]:
    infos = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    types = {info.name: info.type.tensor_type.elem_type for info in infos}
    return types | {entry.name: entry.data_type for entry in model.graph.initializer}


def _node_types(model: onnx.ModelProto) -> dict[str, set[int]]:
    """The floating point types of each node's inputs and outputs, Casts aside."""
    types = _types(model)
    return {
        node.name: {types[name] for name in (*node.input, *node.output) if name} & FLOATS
        for node in model.graph.node
        if node.op_type not in ("Cast", "Resize")  # Resize's scales are always float32
    }


def test_every_node_has_one_floating_point_type(toy_half: onnx.ModelProto) -> None:
    mixed = [name for name, types in _node_types(toy_half).items() if len(types) > 1]
    assert mixed == []


def test_the_products_of_both_encoders_and_the_decoder_are_in_half(
    toy_half: onnx.ModelProto,
) -> None:
    graph, types = ModelGraph(toy_half), _types(toy_half)
    tail = graph.tail()
    products = [
        index
        for index in graph.after_pixels() - tail
        if graph.nodes[index].op_type in ("MatMul", "Conv", "Gemm")
    ]
    assert len(products) > 50
    assert {types[graph.nodes[index].output[0]] for index in products} == {TensorProto.FLOAT16}


def test_layer_norms_stay_in_float32(toy_half: onnx.ModelProto) -> None:
    types = _types(toy_half)
    norms = [node for node in toy_half.graph.node if node.op_type == "LayerNormalization"]
    assert norms
    assert {types[name] for node in norms for name in node.input} == {TensorProto.FLOAT}


def test_all_from_the_upscaling_on_stays_in_float32(toy_half: onnx.ModelProto) -> None:
    graph, types = ModelGraph(toy_half), _types(toy_half)
    results = {types[name] for index in graph.tail() for name in graph.nodes[index].output}
    upscaling = [i for i, block in enumerate(graph.blocks) if block == UPSCALING]
    assert upscaling
    assert TensorProto.FLOAT16 not in results
    for index in upscaling:
        assert index in graph.tail() or graph.nodes[index].op_type == "Cast"


@pytest.mark.parametrize(
    "written_out",
    [
        """mean = ReduceMean (first, last)  centred = Sub (first, mean)
        squared = Pow (centred, two)  variance = ReduceMean (squared, last)
        positive = Add (variance, epsilon)
        deviation = Sqrt (positive)  scaled = Div (centred, deviation)
        normed = Mul (scaled, norm_weight)""",
        """length = ReduceL2 (first, last)  inverse = Reciprocal (length)
        normed = Mul (first, inverse)""",
        """squares = ReduceSumSquare (first, last)  length = Sqrt (squares)
        normed = Div (first, length)""",
        "total = ReduceSum (first, last)  normed = Sub (first, total)",
    ],
    ids=["layer", "l2", "squares", "sum"],
)
def test_a_norm_that_is_written_out_stays_in_float32(written_out: str) -> None:
    model = two_blocks()
    node = next(n for n in model.graph.node if n.op_type == "LayerNormalization")
    place = list(model.graph.node).index(node)
    nodes = onnx.parser.parse_graph(
        f"norm (float[4] first) => (float[4] normed) {{ {written_out} }}"
    )
    del model.graph.node[place]
    for offset, new in enumerate(nodes.node):
        model.graph.node.insert(place + offset, new)
    constants = {"last": np.array([-1]), "two": np.float32(2), "epsilon": np.float32(1e-6)}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()
    )

    types = _types(convert_to_half(model, "fp16"))

    assert {types[n.output[0]] for n in nodes.node} == {TensorProto.FLOAT}
    assert types["product"] == TensorProto.FLOAT16


def test_what_no_pixel_changes_stays_in_float32() -> None:
    model = two_blocks()
    product = onnx.helper.make_node("MatMul", ["shared", "second_weight"], ["constant"])
    model.graph.node.insert(0, product)
    next(n for n in model.graph.node if n.name == "node_second").input[1] = "constant"

    types = _types(convert_to_half(model, "fp16"))

    assert types["constant"] == TensorProto.FLOAT
    assert types["second"] == TensorProto.FLOAT16


def test_a_tensor_is_cast_once_for_all_who_take_it() -> None:
    model = two_blocks()
    second = next(n for n in model.graph.node if n.name == "node_second")
    other = onnx.NodeProto()
    other.CopyFrom(second)
    other.name, other.input[0], other.output[0] = "node_other", "normed_twin", "unused"
    twin = onnx.helper.make_node("Sub", ["normed", "shared"], ["normed_twin"], name="node_twin")
    model.graph.node.insert(5, twin)
    model.graph.node.insert(6, other)

    converted = convert_to_half(model, "fp16")

    casts = [n for n in converted.graph.node if n.op_type == "Cast" and n.input[0] == "normed"]
    assert len(casts) == 1


def test_a_constant_of_one_type_keeps_its_name_and_one_of_both_is_stored_twice() -> None:
    types = _types(convert_to_half(two_blocks(), "fp16"))
    assert types["second_weight"] == TensorProto.FLOAT16
    assert types["norm_weight"] == TensorProto.FLOAT
    assert (types["shared"], types["shared_fp16"]) == (TensorProto.FLOAT, TensorProto.FLOAT16)


@pytest.mark.parametrize("gain", [1e6, -1e6])
def test_a_constant_beyond_float16_names_its_block(gain: float) -> None:
    model = two_blocks(gain=gain)
    with raises(SettingsError, "gain", "1e+06", f"--fp32-islands {FIRST}"):
        convert_to_half(model, "fp16")
    ((block, reason),) = constants_beyond(model).items()
    assert block == FIRST
    assert "gain" in reason
    assert _types(convert_to_half(model, "bf16"))["gain"] == TensorProto.BFLOAT16


def test_a_constant_at_the_end_of_float16_is_in_half() -> None:
    model = two_blocks(gain=65_504.0)
    assert constants_beyond(model) == {}
    assert _types(convert_to_half(model, "fp16"))["gain"] == TensorProto.FLOAT16


def test_large_constants_of_float32_and_of_integers_are_no_reason() -> None:
    model = two_blocks()
    large = numpy_helper.from_array(np.full(4, 1e6, np.float32), "shared")
    next(n for n in model.graph.initializer if n.name == "shared").CopyFrom(large)
    model.graph.initializer.extend(
        numpy_helper.from_array(np.array([value]), name)
        for name, value in (("zero", 0), ("end", np.iinfo(np.int64).max))
    )
    cut = onnx.helper.make_node("Slice", ["first", "zero", "end"], ["cut"])
    model.graph.node.insert(4, cut)
    assert list(constants_beyond(model)) == [SECOND]  # and not what follows the upscaling


def test_the_block_that_is_named_is_one_in_half() -> None:
    model = two_blocks(gain=1e6)
    before = onnx.helper.make_node("Mul", ["pixels", "gain"], ["bright"])  # in float32
    model.graph.node.insert(1, before)
    next(n for n in model.graph.node if n.name == "node_embedded").input[0] = "bright"
    with raises(SettingsError, "gain", f"--fp32-islands {FIRST}"):
        convert_to_half(model, "fp16")


def test_the_scales_of_a_resize_in_half_stay_in_float32() -> None:
    model = two_blocks()
    resize = onnx.helper.make_node("Resize", ["product", "", "scales"], ["resized"])
    model.graph.node.insert(6, resize)
    next(n for n in model.graph.node if n.name == "node_second").input[0] = "resized"
    scales = numpy_helper.from_array(np.ones(4, np.float32), "scales")
    model.graph.initializer.append(scales)
    types = _types(convert_to_half(model, "fp16"))
    assert (types["resized"], types["scales"]) == (TensorProto.FLOAT16, TensorProto.FLOAT)


def test_truth_values_and_casts_of_the_model_keep_their_types() -> None:
    model = two_blocks()
    nodes = {node.name: node for node in model.graph.node}
    place = list(model.graph.node).index(nodes["node_upscaled"])
    nodes["node_upscaled"].input[0] = "cast"
    shifted = nodes["node_shifted"]
    shifted.op_type = "Where"
    shifted.input[:] = ["above", "upscaled", "shared"]
    between = onnx.parser.parse_graph(
        """between (float[4] second) => (float[4] cast)
        { above = Greater (second, shared)  single = Cast <to = 1> (second)
          cast = Mul (single, shared) }"""
    )
    for offset, new in enumerate(between.node):
        model.graph.node.insert(place + offset, new)

    types = _types(convert_to_half(model, "fp16"))

    assert types["above"] == TensorProto.BOOL
    assert (types["single"], types["cast"]) == (TensorProto.FLOAT, TensorProto.FLOAT16)


def test_an_island_stays_in_float32_and_its_neighbours_do_not() -> None:
    types = _types(convert_to_half(two_blocks(gain=1e6), "fp16", {FIRST}))
    assert types["first"] == TensorProto.FLOAT
    assert types["second"] == TensorProto.FLOAT16


def test_the_blocks_are_named_in_their_order() -> None:
    model = two_blocks()
    for entry in (entry for node in model.graph.node for entry in node.metadata_props):
        entry.value = entry.value.replace("blocks.0", "blocks.9").replace("blocks.1", "blocks.10")
    assert half_blocks(model) == ("image_encoder.blocks.9", "image_encoder.blocks.10")


def test_an_island_that_is_no_block_is_refused() -> None:
    with raises(SettingsError, "image_encoder.blocks.7", FIRST, SECOND):
        convert_to_half(two_blocks(), "fp16", {FIRST, "image_encoder.blocks.7"})


def test_islands_everywhere_are_refused() -> None:
    with raises(SettingsError, "fp16"):
        convert_to_half(two_blocks(), "fp16", {FIRST, SECOND})


def test_bfloat16_leaves_operators_that_do_not_know_it_in_float32() -> None:
    convolution = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20]>
        g (uint8[B,3,4,4] image) => (float[B,2,4,4] low_res_logits)
        <float[2,3,1,1] kernel, float[2,2,1,1] other>
        { pixels = Cast <to = 1> (image)
          a = Conv (pixels, kernel)
          b = Relu (a)
          low_res_logits = ConvTranspose (b, other) }"""
    )
    kernel = np.ones((2, 3, 1, 1), np.float32)
    convolution.graph.initializer.append(numpy_helper.from_array(kernel, "kernel"))
    convolution.graph.initializer.append(numpy_helper.from_array(kernel[:, :2], "other"))
    for node, block in zip(convolution.graph.node, ("", FIRST, SECOND, UPSCALING), strict=True):
        noted(node, block)
    # A Conv learns bfloat16 in opset 22.
    types = _types(convert_to_half(convolution, "bf16"))
    assert (types["a"], types["b"]) == (TensorProto.FLOAT, TensorProto.BFLOAT16)
    assert half_blocks(convolution, "bf16") == (SECOND,)
    with raises(SettingsError, FIRST):
        convert_to_half(convolution, "bf16", {FIRST})


def test_a_node_without_a_note_belongs_to_the_block_before_it() -> None:
    model = two_blocks()
    for node in model.graph.node:
        if node.name == "node_second":
            del node.metadata_props[:]
    graph = ModelGraph(model)
    blocks = dict(zip([node.name for node in graph.nodes], graph.blocks, strict=True))
    assert blocks["node_second"] == SECOND


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("", "segmenter"),
        ("segmenter", "segmenter"),
        ("segmenter.image_encoder.blocks.3.attn.qkv", "image_encoder.blocks.3"),
        ("pathology_encoder.vit.blocks.11.mlp", "pathology_encoder.vit.blocks.11"),
        ("segmenter.neck.0", "neck"),
        ("mask_decoder.transformer.layers.1.norm1", "mask_decoder.transformer.layers.1"),
        ("mask_decoder.layers.1.norm1", "mask_decoder.layers.1"),
        (
            "mask_decoder.output_hypernetworks_mlps.2.layers.0",
            "mask_decoder.output_hypernetworks_mlps",
        ),
    ],
)
def test_a_module_belongs_to_a_block(module: str, block: str) -> None:
    assert block_of_module(module) == block


def test_control_flow_is_refused() -> None:
    model = two_blocks()
    branch = onnx.helper.make_graph([], "branch", [], [])
    model.graph.node.append(
        onnx.helper.make_node("If", ["flag"], ["x"], then_branch=branch, else_branch=branch)
    )
    with raises(GraphError, "--no-fp16"):
        convert_to_half(model, "fp16")
