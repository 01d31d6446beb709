"""Every published kind of pathology encoder, tiny and with random weights, as export takes it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from export.gate.answers import onnx_answers
from export.graph.attention import AttentionForm
from export.graph.encoders import FoldedSegmenter
from export.graph.pathology_encoder import FoldedPathologyEncoder
from export.graph.reference import Deployable
from export.graph.to_onnx import export_onnx
from export.tensorrt.lint import engine_obstacles
from tests.support.toy_data import TILE_SIZE_PX, toy_settings
from tests.support.toy_gate import noise_gate
from train.model.encoder_kinds import ENCODER_KINDS
from train.model.segmenter import Segmenter

NUM_CLASSES = 5
_SAME_FORM = {
    "phikon": "hipt",
    "phikon-v2": "uni",
    "h-optimus-1": "h-optimus-0",
    "hibou-l": "hibou-b",
}
"""Kinds that differ from another one in size or normalisation alone."""
_ONNX = ("hibou-b", "uni2-h", "virchow2")
"""Between them they have every operator of the kinds: registers with and without positions, layer
scale, GELU and SwiGLU, patches of 14 pixels. Patches of 16 without registers are the toy model's.
"""


def tiny_segmenter(kind: str) -> Segmenter:
    """A segmenter with an encoder of that kind, and both encoders one block deep."""
    torch.manual_seed(0)
    model = replace(
        toy_settings().model,
        pathology_encoder=kind,
        pathology_args={"embed_dim": 48, "num_heads": 3},
        pathology_encoder_depth=1,
    )
    segmenter = Segmenter(model, NUM_CLASSES).eval()
    segmenter.image_encoder.blocks = segmenter.image_encoder.blocks[:1]
    for name, parameter in segmenter.named_parameters():
        if parameter.ndim == 1 or "token" in name or "pos_embed" in name:
            nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
    return segmenter


@pytest.mark.parametrize("kind", sorted(ENCODER_KINDS.keys() - _SAME_FORM.keys()))
def test_every_kind_of_pathology_encoder_is_folded_and_answers_the_same(kind: str):
    deployable = Deployable(tiny_segmenter(kind)).eval()
    folded = FoldedSegmenter(deployable, AttentionForm()).eval()
    assert isinstance(folded.pathology_encoder, FoldedPathologyEncoder)
    shape = (2, TILE_SIZE_PX, TILE_SIZE_PX, 3)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    features: list[torch.Tensor] = []  # of the encoder: the logits depend little on it
    for model, encoder in (
        (deployable, deployable.segmenter.pathology_encoder),
        (folded, folded.pathology_encoder),
    ):
        encoder.register_forward_hook(lambda *call: features.append(call[2]))
        with torch.inference_mode():
            model(images)
    expected, found = features[0].flatten(2).transpose(1, 2), features[1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", _ONNX)
def test_the_graph_of_a_kind_passes_the_gate(kind: str, tmp_path: Path):
    deployable = Deployable(tiny_segmenter(kind)).eval()
    export_onnx(deployable, tmp_path / "model.onnx")
    assert engine_obstacles(tmp_path / "model.onnx") == ()
    gate = noise_gate(deployable, "ABCDE")
    answers = onnx_answers(tmp_path / "model.onnx", gate.tiles.images)
    found = gate.judge(answers, "model.onnx", "fp32")
    assert found.passed, found.failures
    assert found.label_agreement == 1


@pytest.mark.parametrize(("kind", "other"), _SAME_FORM.items())
def test_kinds_that_are_not_exported_here_have_the_form_of_one_that_is(kind: str, other: str):
    forms = [tiny_segmenter(name).pathology_encoder for name in (kind, other)]
    shapes = [{n: tuple(p.shape) for n, p in form.vit.named_parameters()} for form in forms]
    assert shapes[0] == shapes[1]
