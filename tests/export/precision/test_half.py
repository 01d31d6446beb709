from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from export.errors import GraphError, SettingsError
from export.graph.nodes import ModelGraph, block_of_module
from export.precision.half import convert_to_half, half_blocks
from tests.support.errors import raises
from tests.support.half_graphs import FIRST, SECOND, UPSCALING, two_blocks

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


def test_a_norm_that_is_written_out_stays_in_float32() -> None:
    model = two_blocks()
    node = next(n for n in model.graph.node if n.op_type == "LayerNormalization")
    place = list(model.graph.node).index(node)
    written_out = [
        onnx.helper.make_node("ReduceMean", ["first", "last"], ["mean"], keepdims=1),
        onnx.helper.make_node("Sub", ["first", "mean"], ["centred"]),
        onnx.helper.make_node("Mul", ["centred", "norm_weight"], ["normed"]),
    ]
    del model.graph.node[place]
    for offset, new in enumerate(written_out):
        model.graph.node.insert(place + offset, new)
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1]), "last"))

    types = _types(convert_to_half(model, "fp16"))

    assert {types[name] for name in ("mean", "centred", "normed")} == {TensorProto.FLOAT}
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


def test_a_constant_beyond_float16_names_its_block() -> None:
    with raises(SettingsError, "gain", "1e+06", f"--fp32-islands {FIRST}"):
        convert_to_half(two_blocks(gain=1e6), "fp16")


def test_an_island_stays_in_float32_and_its_neighbours_do_not() -> None:
    types = _types(convert_to_half(two_blocks(gain=1e6), "fp16", {FIRST}))
    assert types["first"] == TensorProto.FLOAT
    assert types["second"] == TensorProto.FLOAT16


def test_the_blocks_are_named_in_their_order() -> None:
    assert half_blocks(two_blocks()) == (FIRST, SECOND)


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
    # A Conv learns bfloat16 in opset 22.
    types = _types(convert_to_half(convolution, "bf16"))
    assert (types["a"], types["b"]) == (TensorProto.FLOAT, TensorProto.BFLOAT16)


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
