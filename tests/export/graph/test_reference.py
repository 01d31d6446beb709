from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from export.gate.answers import onnx_answers
from export.graph.attention import PLAIN, AttentionForm
from export.graph.encoders import FoldedSegmenter
from export.graph.pathology_encoder import FoldedPathologyEncoder
from export.graph.reference import Deployable, DeployableOutput
from export.graph.to_onnx import export_onnx
from export.precision.half import convert_to_half
from export.tensorrt.lint import engine_obstacles, lint
from tests.support.toy_data import toy_settings
from tests.support.toy_gate import noise_gate
from train.model.class_bias import STRATEGIES
from train.model.segmenter import Segmenter

NUM_CLASSES = 4
PADDED, EXACT = 144, 128
"""Tiles of 9 x 9 and 8 x 8 tokens; windows are 8 x 8."""


def make_deployable(
    tile_size_px: int, bias: str = "dfa", *, num_blocks: int | None = None, **changes: object
) -> Deployable:
    """A toy model in which every parameter counts: biases, norms and positions are random.

    The image encoder keeps its first `num_blocks`; tests of other parts are exported faster so.
    """
    torch.manual_seed(0)
    model = replace(toy_settings().model, bias=bias, tile_size_px=tile_size_px, **changes)
    segmenter = Segmenter(model, NUM_CLASSES)
    segmenter.image_encoder.blocks = segmenter.image_encoder.blocks[:num_blocks]
    if bias != "none":
        for parameter in segmenter.class_attention_bias.parameters():
            nn.init.normal_(parameter)
    for name, parameter in segmenter.named_parameters():
        is_flat = parameter.dim() == 1 and "class_attention_bias" not in name
        if is_flat or any(part in name for part in ("rel_pos", "pos_embed", "token")):
            nn.init.normal_(parameter, std=0.5)
    return Deployable(segmenter).eval()


def tiles(count: int, side: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def answers(model: nn.Module, images: np.ndarray) -> DeployableOutput:
    with torch.inference_mode():
        return DeployableOutput(*model(torch.from_numpy(images)))


@pytest.fixture(scope="module")
def padded() -> Deployable:
    return make_deployable(PADDED)


@pytest.fixture(scope="module", params=[20, 23])
def graph_file(
    request: pytest.FixtureRequest, padded: Deployable, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("graph") / f"opset{request.param}.onnx"
    export_onnx(padded, path, opset=request.param)
    return path


def assert_same(found: DeployableOutput, expected: DeployableOutput):
    torch.testing.assert_close(found.low_res_logits, expected.low_res_logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.iou_scores, expected.iou_scores, atol=1e-4, rtol=0)
    assert (found.labels == expected.labels).float().mean() > 0.999
    for first, second in (
        (found.confidence, expected.confidence),
        (found.low_res_probabilities, expected.low_res_probabilities),
    ):
        assert (first.int() - second.int()).abs().max() <= 1


def assert_folds(
    deployable: Deployable, side: int, form: AttentionForm = PLAIN
) -> DeployableOutput:
    """Check that folding changes no answer; return the answers."""
    images = tiles(2, side)
    expected = answers(deployable, images)
    assert_same(answers(FoldedSegmenter(deployable, form).eval(), images), expected)
    return expected


def assert_graph_answers(path: Path, deployable: Deployable, side: int):
    session = ort.InferenceSession(path)
    for count in (1, 3):
        images = tiles(count, side)
        found = [torch.from_numpy(answer) for answer in session.run(None, {"image": images})]
        assert_same(DeployableOutput(*found), answers(deployable, images))


def assert_runs_in_half_precision(path: Path, deployable: Deployable):
    onnx.save(convert_to_half(onnx.load(str(path)), "fp16"), str(path))
    assert engine_obstacles(path) == ()
    labels = ort.InferenceSession(path).run(["labels"], {"image": tiles(3, 64)})[0]
    assert (labels == answers(deployable, tiles(3, 64)).labels.numpy()).mean() > 0.98


@pytest.mark.parametrize("tile_size_px", [EXACT, PADDED, 64])
@pytest.mark.parametrize(
    "form",
    [
        AttentionForm(),
        AttentionForm(positions="extended", max_queries=20),
    ],
)
def test_folding_changes_no_answer(tile_size_px: int, form: AttentionForm):
    deployable = make_deployable(tile_size_px)
    assert_folds(deployable, tile_size_px, form)


@pytest.mark.parametrize(
    "name",
    [
        "deit3_small_patch16_224",
        "vit_base_patch16_clip_224",
        "vit_small_patch16_18x2_224",  # two attentions side by side in a block
        "vit_base_patch16_rpn_224",  # norms after attention and MLP
        "deit_tiny_distilled_patch16_224",  # two prefix tokens
    ],
)
def test_folding_changes_no_answer_of_another_pathology_encoder(name: str):
    assert_folds(make_deployable(64, pathology_encoder=name, pathology_encoder_depth=1), 64)


@pytest.mark.parametrize("image_encoder", ["tiny_conv", "tiny_pyramid"])
def test_folding_changes_no_answer_of_a_convolutional_stem(image_encoder: str):
    deployable = make_deployable(64, num_blocks=1, image_encoder=image_encoder)
    assert_folds(deployable, 64)


@pytest.mark.slow
def test_the_graph_of_a_stem_with_skips_passes_the_gate_and_runs_in_half_precision(tmp_path: Path):
    """It has every operator of the stem without them."""
    deployable = make_deployable(64, num_blocks=1, image_encoder="tiny_pyramid")
    path = tmp_path / "model.onnx"
    export_onnx(deployable, path)
    gate = noise_gate(deployable, "ABCD")
    found = gate.judge(onnx_answers(path, gate.tiles.images), path.name, "fp32")
    assert found.passed, found.failures
    assert_runs_in_half_precision(path, deployable)


@pytest.mark.parametrize("bias", [name for name, entry in STRATEGIES.items() if entry.learned])
def test_folding_changes_no_answer_of_a_learned_strategy(bias: str):
    expected = assert_folds(make_deployable(64, bias), 64)
    without = answers(make_deployable(64, "none"), tiles(2, 64)).low_res_logits
    assert (expected.low_res_logits - without).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("bias", ["dfa_heads", "dfa_temperature", "dfa_masks"])
def test_the_graph_of_our_strategies_answers_as_torch_does(bias: str, tmp_path: Path):
    deployable = make_deployable(64, bias, num_blocks=0)
    export_onnx(deployable, tmp_path / "model.onnx")
    assert_graph_answers(tmp_path / "model.onnx", deployable, 64)


SMALL: dict[str, object] = {"embed_dim": 64, "num_heads": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        # rotary positions, registers, SwiGLU, 14 pixels
        ("vit_small_patch16_dinov3", SMALL | {"swiglu_mlp": True, "patch_size": 14}),
        ("beit_base_patch16_224", SMALL),  # a position bias
    ],
)
def test_each_other_kind_of_encoder_is_exported_with_any_batch_for_every_runtime(
    name: str, changes: dict[str, object], tmp_path: Path
):
    deployable = make_deployable(
        64,
        num_blocks=0,
        pathology_encoder=name,
        pathology_encoder_depth=1,
        pathology_args=changes,
    )
    assert not FoldedPathologyEncoder.fits(deployable.segmenter.pathology_encoder)
    path = tmp_path / "model.onnx"
    export_onnx(deployable, path)
    assert_graph_answers(path, deployable, 64)
    assert engine_obstacles(path) == ()
    assert_runs_in_half_precision(path, deployable)


@pytest.mark.slow
def test_the_graph_answers_as_torch_does_for_any_batch(graph_file: Path, padded: Deployable):
    assert_graph_answers(graph_file, padded, PADDED)


@pytest.mark.slow
def test_the_graph_breaks_no_rule_of_tensorrts_parser(graph_file: Path):
    assert lint(onnx.load(str(graph_file))) == []


@pytest.mark.slow
def test_nothing_that_no_image_changes_is_computed(graph_file: Path):
    """No positions, no shapes, no copies of constants: all nodes come after the image."""
    graph = onnx.load(str(graph_file)).graph
    depends = {graph.input[0].name}
    for node in graph.node:
        if node.op_type != "Constant":
            assert depends & set(node.input), f"{node.op_type} {node.name} takes constants only"
        depends |= set(node.output) if depends & set(node.input) else set()
    operators = Counter(node.op_type for node in graph.node)
    assert not operators.keys() & {"Sin", "Cos", "Shape", "Expand", "Tile", "ConvTranspose"}


@pytest.mark.slow
def test_opset_23_writes_the_encoders_attention_as_one_operator(
    graph_file: Path, padded: Deployable
):
    model = onnx.load(str(graph_file))
    num_blocks = len(padded.segmenter.image_encoder.blocks) + 1
    found = sum(node.op_type == "Attention" for node in model.graph.node)
    assert found == (num_blocks if model.opset_import[0].version >= 23 else 0)


@pytest.mark.slow
def test_masks_of_the_unlabelled_and_the_single_mask_token_are_not_computed(graph_file: Path):
    constants = {entry.name: entry for entry in onnx.load(str(graph_file)).graph.initializer}
    hypernetwork = constants["mask_decoder.output_hypernetworks_mlps.layers.0.weight"]
    scores = constants["mask_decoder.iou_prediction_head.layers.2.weight"]
    assert hypernetwork.dims[0] == NUM_CLASSES
    assert scores.dims[-1] == NUM_CLASSES


@pytest.mark.slow
def test_the_form_of_attention_is_the_callers_choice(tmp_path: Path):
    deployable = make_deployable(PADDED, num_blocks=3)
    form = AttentionForm(positions="extended", max_queries=40)
    export_onnx(deployable, tmp_path / "model.onnx", form=form)
    nodes = onnx.load(str(tmp_path / "model.onnx")).graph.node
    num_softmax = sum(node.op_type == "Softmax" for node in nodes)
    # In two parts in two blocks of 64-token windows, in three in a global block of 81 tokens and in
    # one of 82; then six attentions of the decoder, and the probabilities.
    assert num_softmax == 2 * 2 + 2 * 3 + 6 + 1
    assert any("one_hot" in name for node in nodes for name in node.input), "extended positions"
    assert_graph_answers(tmp_path / "model.onnx", deployable, PADDED)
