"""Exports the deployable model to ONNX and checks the graph."""

import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from export.errors import GraphError
from export.graph.attention import AttentionForm
from export.graph.encoders import FoldedSegmenter
from export.graph.nodes import ModelGraph
from export.graph.pathology_encoder import UnfoldedPathologyEncoder
from export.graph.reference import Deployable, DeployableOutput
from train.model.checkpoint import MAX_WEIGHTS_BYTES
from train.settings import ModelSettings

BIAS_NAME = "class_attention_bias"
OPSETS = range(20, 25)
"""Opsets that the exporter writes, ONNX Runtime runs and TensorRT's parser reads."""
_EXAMPLE_BATCH = 2


def check_model(weights: Path, model: ModelSettings) -> None:
    """Check that a checkpoint is of the paper's model, and fits into one ONNX file.

    Raises:
        GraphError: it is of another network, or its float32 weights are too large.
    """
    if model.network != "sam_path":
        raise GraphError(
            f"{weights} is of --network {model.network}, which `train` compares with and nobody "
            "serves; expected the paper's model. Train with --network sam_path."
        )
    num_bytes = weights.stat().st_size if weights.is_file() else 0
    if num_bytes > MAX_WEIGHTS_BYTES:
        raise GraphError(
            f"{weights} has {num_bytes / 4e6:.0f} million parameters, {model.image_encoder} and "
            f"{model.pathology_encoder}; an ONNX file holds 2 GiB, which is "
            f"{MAX_WEIGHTS_BYTES / 4e6:.0f} million in float32. Train with smaller encoders: vit_b "
            "leaves room for a pathology encoder of 420 million, vit_l for one of 200 million, "
            "and vit_h for none."
        )


def export_onnx(
    deployable: Deployable, path: Path, *, opset: int = 20, form: AttentionForm | None = None
) -> None:
    """Write the folded model with a dynamic batch. Its outputs are those of `DeployableOutput`.

    Args:
        deployable: the reference, whose outputs the graph reproduces.
        path: the file to write.
        opset: ONNX's opset. From 23 on, attention uses ONNX's operator where possible.
        form: how attention is written. The default was measured as fastest, see docs/export.md.

    Raises:
        GraphError: the graph is not valid, or lacks the bias.
    """
    folded = FoldedSegmenter(deployable, form or AttentionForm(operator=opset >= 23)).eval()
    side = folded.input_px
    example = torch.randint(0, 256, (_EXAMPLE_BATCH, side, side, 3), dtype=torch.uint8)
    # Tracing with a symbolic batch takes twice as long. The folded model uses the batch only as the
    # first dimension, so it is made dynamic afterwards. Other encoders may use it elsewhere.
    is_unfolded = isinstance(folded.pathology_encoder, UnfoldedPathologyEncoder)
    dynamic = {"image": {0: torch.export.Dim("batch", min=1, max=1024)}} if is_unfolded else None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # The exporter warns about its own internals. Its output is checked below.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            folded,
            (example,),
            dynamo=True,
            opset_version=opset,
            input_names=["image"],
            output_names=list(DeployableOutput._fields),
            dynamic_shapes=dynamic,
            verbose=False,
        )
    assert program is not None, "the dynamo exporter returns a program"
    if is_unfolded:
        _measure_the_cast_image(program.model)
    else:
        _free_the_batch(program.model)
    program.save(str(path))
    check_graph(path)


def _free_the_batch(model: ir.Model) -> None:
    """Make the first dimension of inputs, outputs and reshape targets dynamic."""
    graph = model.graph
    for value in (*graph.inputs, *graph.outputs):
        assert value.shape is not None, f"{value} has no shape"
        value.shape = ir.Shape(["batch", *value.shape.dims[1:]])
    for node in graph:
        for value in set(node.outputs) - set(graph.outputs):
            value.shape = None  # drop the example's shape
        assert node.op_type not in ("Expand", "Tile", "ConstantOfShape", "Shape"), node
        if node.op_type != "Reshape":
            continue
        target = node.inputs[1]
        assert target is not None, "Reshape has two inputs"
        shape = ir.convenience.get_const_tensor(target)
        assert shape is not None, f"{node} has a computed target shape"
        first, *others = shape.numpy().tolist()
        assert first == -1 or first % _EXAMPLE_BATCH == 0, f"{node} does not begin with the batch"
        name = "_".join(["shape", "batch", *map(str, others)])
        if name not in graph.initializers:
            tensor = ir.tensor(np.array([-1, *others], np.int64), name=name)
            graph.register_initializer(ir.val(name, const_value=tensor))
        node.replace_input_with(1, graph.initializers[name])
    RemoveUnusedNodesPass()(model)


def _measure_the_cast_image(model: ir.Model) -> None:
    """Read the batch size from the float32 image instead of the uint8 input.

    TensorRT allows a uint8 tensor only as the input of a Cast, which keeps the shape.
    """
    (image,) = model.graph.inputs
    (cast,) = (node for node in image.consumers() if node.op_type == "Cast")
    for node in image.consumers():
        if node.op_type == "Shape":
            node.replace_input_with(0, cast.outputs[0])
    model.graph.sort()


def check_graph(path: Path) -> None:
    """Check that the file is a valid model and that both cross-attentions add the bias.

    Raises:
        GraphError: one of these checks fails.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except onnx.checker.ValidationError as error:
        raise GraphError(f"{path.name} is not a valid ONNX model: {error}") from error
    graph = ModelGraph(onnx.load(str(path), load_external_data=False))
    # One constant for both blocks, or BIAS_NAME_0 and BIAS_NAME_1 if they differ.
    names = [name for name in graph.initializers if name.startswith(BIAS_NAME)]
    num_uses = sum(len(graph.consumers[name]) for name in names)
    if num_uses != 2:
        raise GraphError(
            f"{path.name} uses the constant {BIAS_NAME} {num_uses} times; expected 2, once in "
            "each image-to-token attention"
        )


def drop_output(source: Path, target: Path, name: str) -> None:
    """Copy a model without one of its outputs and without the exporter's metadata.

    The metadata contains source paths of the exporting machine. The nodes stay the same.
    """
    model = onnx.load(str(source))
    kept = [output for output in model.graph.output if output.name != name]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info, *kept):
        del part.metadata_props[:]
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(target))
