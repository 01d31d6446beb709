import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from export.errors import GraphError
from export.graph.reference import Deployable, DeployableOutput
from export.graph.to_onnx import BIAS_NAME, check_graph
from serve.contract.manifest import Manifest, read_bundle
from tests.support.errors import raises
from train.model.checkpoint import load_checkpoint
from train.model.segmenter import labels_from_logits

SIDE, NUM_CLASSES = 64, 5


@pytest.fixture(scope="module")
def deployable(toy_run: Path) -> Deployable:
    return Deployable(load_checkpoint(toy_run)[0]).eval()


@pytest.fixture(scope="module")
def manifest(exported_bundle: Path) -> Manifest:
    return read_bundle(exported_bundle)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)


def test_labels_are_the_trained_models_own(deployable: Deployable, image: np.ndarray):
    with torch.inference_mode():
        output = DeployableOutput(*deployable(torch.from_numpy(image)))
        images = torch.from_numpy(image).permute(0, 3, 1, 2).float()
        expected = labels_from_logits(deployable.segmenter(images).low_res_logits, SIDE)
    assert torch.equal(output.labels.long(), expected)


def test_confidence_is_the_probability_of_the_label(deployable: Deployable, image: np.ndarray):
    with torch.inference_mode():
        output = DeployableOutput(*deployable(torch.from_numpy(image)))
    logits = torch.nn.functional.interpolate(
        output.low_res_logits, size=(SIDE, SIDE), mode="bilinear"
    )
    probabilities = logits.softmax(dim=1).gather(1, output.labels.long()[:, None] - 1)[:, 0]
    torch.testing.assert_close(
        output.confidence.float() / 255, probabilities, atol=0.5 / 255, rtol=0
    )


def test_the_graph_answers_the_interface_for_any_batch(exported_bundle: Path, manifest: Manifest):
    session = ort.InferenceSession(str(exported_bundle / "model.onnx"))
    found_outputs = [entry.name for entry in session.get_outputs()]
    assert found_outputs == [spec.name for spec in manifest.outputs]
    for batch in (1, 3, manifest.max_batch_size):
        answers = session.run(None, {"image": np.zeros((batch, SIDE, SIDE, 3), np.uint8)})
        for spec, answer in zip(manifest.outputs, answers, strict=True):
            assert answer.shape == (batch, *spec.shape[1:])
            assert answer.dtype == spec.dtype


def test_the_learned_bias_is_a_named_constant_of_both_cross_attentions(
    exported_bundle: Path, manifest: Manifest
):
    graph = onnx.load(str(exported_bundle / "model.onnx")).graph
    constants = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    folded = constants[BIAS_NAME].ravel()
    np.testing.assert_allclose(folded, [0, 0, 0, *manifest.class_attention_bias], atol=1e-6)
    assert sum(BIAS_NAME in node.input for node in graph.node) == 2


def test_another_bias_in_the_graph_changes_the_answer(toy_graph: Path, image: np.ndarray):
    model = onnx.load(str(toy_graph))
    constant = next(entry for entry in model.graph.initializer if entry.name == BIAS_NAME)
    other = onnx.numpy_helper.to_array(constant) + np.array([0, 0, 0, 5, -5, 5, -5, 5], np.float32)
    constant.CopyFrom(onnx.numpy_helper.from_array(other.astype(np.float32), BIAS_NAME))
    before = ort.InferenceSession(str(toy_graph)).run(["low_res_logits"], {"image": image})[0]
    session = ort.InferenceSession(model.SerializeToString())
    after = session.run(["low_res_logits"], {"image": image})[0]
    assert np.abs(after - before).max() > 1e-4


def test_a_graph_without_the_bias_is_refused(toy_graph: Path, tmp_path: Path):
    model = onnx.load(str(toy_graph))
    zero = onnx.numpy_helper.from_array(np.zeros(1, np.float32), "nothing")
    model.graph.initializer.append(zero)
    for node in model.graph.node:
        node.input[:] = ["nothing" if name == BIAS_NAME else name for name in node.input]
    onnx.save(model, str(tmp_path / "model.onnx"))
    with raises(GraphError, "class_attention_bias 0 times", "expected 2"):
        check_graph(tmp_path / "model.onnx")


def test_the_version_follows_the_checkpoint(manifest: Manifest):
    assert manifest.version == manifest.checkpoint_sha256[:12]


def test_the_manifest_is_plain_json_without_unknown_fields(exported_bundle: Path):
    content = json.loads((exported_bundle / "manifest.json").read_text())
    assert content["classes"][0] == {"name": "Tumor", "color": "#d62728"}
    assert set(content) == set(Manifest.model_fields)
