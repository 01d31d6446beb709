"""From the deployable model to an ONNX graph, checked."""

import logging
import warnings
from pathlib import Path

import onnx
import torch

from export.deployable import Deployable, DeployableOutput
from train.errors import FocalPathError

BIAS_NAME = "class_attention_bias"
PARITY_OUTPUT = "low_res_logits"


def export_onnx(deployable: Deployable, path: Path, *, opset: int = 20) -> None:
    """Write the model with a dynamic batch, and all of `DeployableOutput` as its outputs.

    Raises:
        FocalPathError: the graph is not valid, or has lost the bias on the way.
    """
    side = deployable.segmenter.tile_size_px
    example = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # The exporter warns of its own internals; what it writes is checked below.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            deployable,
            (example,),
            dynamo=True,
            opset_version=opset,
            input_names=["image"],
            output_names=list(DeployableOutput._fields),
            dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1, max=1024)}},
            verbose=False,
        )
    assert program is not None, "the dynamo exporter returns a program"
    program.save(str(path))
    check_graph(path)


def check_graph(path: Path) -> None:
    """Check that the file is a valid model and that both cross-attentions add the bias.

    Raises:
        FocalPathError: it is not.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except onnx.checker.ValidationError as error:
        raise FocalPathError(f"{path.name} is not a valid ONNX model: {error}") from error
    graph = onnx.load(str(path), load_external_data=False).graph
    num_uses = sum(BIAS_NAME in node.input for node in graph.node)
    if BIAS_NAME not in {entry.name for entry in graph.initializer} or num_uses != 2:
        raise FocalPathError(
            f"{path.name} uses the constant {BIAS_NAME} {num_uses} times; expected 2, once in "
            "each image-to-token attention"
        )


def drop_output(source: Path, target: Path, name: str) -> None:
    """Copy a model without one of its outputs; the nodes stay the same."""
    model = onnx.load(str(source))
    kept = [output for output in model.graph.output if output.name != name]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(target))
