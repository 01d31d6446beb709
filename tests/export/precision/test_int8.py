import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from export.precision.int8 import SENSITIVE, quantize_int8

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def graphs(toy_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float32 graph and its int8 one."""
    path = tmp_path_factory.mktemp("quantize") / "model.int8.onnx"
    quantize_int8(toy_graph, path)
    return toy_graph, path


def test_the_int8_graph_gives_nearly_the_same_labels(graphs: tuple[Path, Path]):
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    first, second = (
        ort.InferenceSession(path).run(["labels"], {"image": images})[0] for path in graphs
    )
    assert (first == second).mean() > 0.9


def test_weights_of_the_encoders_are_int8_with_a_scale_a_channel(graphs: tuple[Path, Path]):
    constants = {entry.name: entry for entry in onnx.load(str(graphs[1])).graph.initializer}
    name = "image_encoder.blocks.0.attn.query.weight"
    assert name not in constants
    assert constants[f"{name}_quantized"].data_type == onnx.TensorProto.INT8
    assert len(constants[f"{name}_scale"].dims) == 1


def test_the_user_is_not_advised_to_pre_process(
    graphs: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    quantize_int8(graphs[0], tmp_path / "model.int8.onnx")
    logging.warning("another warning")
    assert caplog.messages == ["another warning"]


def test_sensitive_parts_and_attention_itself_stay_in_float32(graphs: tuple[Path, Path]):
    before, after = (onnx.load(str(path)).graph for path in graphs)
    names = {entry.name for entry in after.initializer}
    weights = {node.input[1] for node in before.node if node.op_type == "MatMul"}
    sensitive = {name for name in weights if any(part in name for part in SENSITIVE)}
    assert len(sensitive) >= 5
    assert sensitive <= names
    assert sum(node.op_type == "MatMul" for node in after.node) > len(sensitive)
