"""Small float32 graphs with the traits of the exported model, for tests of half precision.

image (B, 4, 4, 3) uint8 -> Cast -> MatMul (block 0) -> LayerNormalization, MatMul, Add (block 1)
-> the upscaling -> logits and labels, and the last norm -> IoU. Each node notes its module as
torch's exporter does.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

WIDTH = 4
FIRST, SECOND = "image_encoder.blocks.0", "image_encoder.blocks.1"
UPSCALING = "mask_decoder.output_upscaling"


def two_blocks(*, gain: float = 1.0, opset: int = 20) -> onnx.ModelProto:
    """The model; `gain` multiplies what the first block gives, and the second divides by it."""
    rng = np.random.default_rng(0)
    constants = {
        "first_weight": rng.normal(0, 0.01, (3, WIDTH)),
        "gain": np.float32(gain),
        "norm_weight": np.ones(WIDTH),
        "norm_bias": np.zeros(WIDTH),
        "second_weight": rng.normal(0, 1, (WIDTH, WIDTH)),
        "shared": rng.normal(0, 1, WIDTH),
        "upscaling_weight": rng.normal(0, 1, (WIDTH, WIDTH)),
    }
    nodes = [
        _node("Cast", ["image"], "pixels", "", to=TensorProto.FLOAT),
        _node("MatMul", ["pixels", "first_weight"], "embedded", FIRST),
        _node("Mul", ["embedded", "gain"], "amplified", FIRST),
        _node("Div", ["amplified", "gain"], "first", FIRST),
        _node("LayerNormalization", ["first", "norm_weight", "norm_bias"], "normed", SECOND),
        _node("MatMul", ["normed", "second_weight"], "product", SECOND),
        _node("Add", ["product", "shared"], "second", SECOND),
        _node("MatMul", ["second", "upscaling_weight"], "upscaled", UPSCALING),
        _node("Add", ["upscaled", "shared"], "shifted", "mask_decoder"),
        _node("Transpose", ["shifted"], "low_res_logits", "", perm=[0, 3, 1, 2]),
        _node("Softmax", ["low_res_logits"], "softmax", "", axis=1),
        _node("Cast", ["softmax"], "low_res_probabilities", "", to=TensorProto.UINT8),
        _node("ArgMax", ["low_res_logits"], "best", "", axis=1, keepdims=0),
        _node("Add", ["best", "one"], "numbered", ""),
        _node("Cast", ["numbered"], "labels", "", to=TensorProto.UINT8),
        _node("Cast", ["best"], "confidence", "", to=TensorProto.UINT8),
        _node(
            "LayerNormalization", ["second", "norm_weight", "norm_bias"], "tokens", "mask_decoder"
        ),
        _node("ReduceMean", ["tokens", "axes"], "iou_scores", "mask_decoder", keepdims=0),
    ]
    return _model(nodes, constants, opset)


def noted(node: NodeProto, module: str) -> NodeProto:
    """The node with the exporter's note of its module."""
    scopes = str(["", *([f"segmenter.{module}"] if module else []), "operation"])
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    return node


def _node(op_type: str, inputs: Sequence[str], output: str, module: str, **attributes: object):
    name = f"node_{output}"
    return noted(helper.make_node(op_type, inputs, [output], name=name, **attributes), module)


def _model(
    nodes: Sequence[NodeProto], constants: dict[str, np.ndarray], opset: int
) -> onnx.ModelProto:
    initializers = [
        numpy_helper.from_array(np.asarray(value, np.float32), name)
        for name, value in constants.items()
    ]
    initializers.append(numpy_helper.from_array(np.array([1, 2]), "axes"))
    initializers.append(numpy_helper.from_array(np.array([1]), "one"))
    graph = helper.make_graph(
        nodes,
        "two_blocks",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 4, 4, 3])],
        [
            helper.make_tensor_value_info("labels", TensorProto.UINT8, ["batch", 4, 4]),
            helper.make_tensor_value_info("confidence", TensorProto.UINT8, ["batch", 4, 4]),
            helper.make_tensor_value_info("iou_scores", TensorProto.FLOAT, ["batch", WIDTH]),
            helper.make_tensor_value_info(
                "low_res_probabilities", TensorProto.UINT8, ["batch", WIDTH, 4, 4]
            ),
            helper.make_tensor_value_info(
                "low_res_logits", TensorProto.FLOAT, ["batch", WIDTH, 4, 4]
            ),
        ],
        initializers,
    )
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model
