from dataclasses import replace

import numpy as np
import pytest

from export.gate.schema import EmulationParity, Precision, Tolerances
from tests.support.toy_gate import NUM_TILES, SIDE, painted_gate, relabelled

PIXELS = NUM_TILES * SIDE**2


def test_torchs_own_answers_pass_every_precision() -> None:
    gate = painted_gate()
    for precision in ("fp32", "fp16", "bf16", "int8"):
        found = gate.judge(gate.expected, "model.onnx", precision)
        assert found.passed
        assert found.label_agreement == 1
        assert found.max_logit_difference == 0


def test_too_few_equal_labels_name_the_tile_and_the_class_that_loses() -> None:
    gate = painted_gate(masks=False)
    found = gate.judge(relabelled(gate, tile=1, num_pixels=64, label=1), "m.onnx", "int8")
    assert found.label_agreement == pytest.approx(1 - 64 / PIXELS)
    for value in ("98.6667%", "torch", "99%", "tile_1", "96.0000%", "Necrosis"):
        assert value in found.failures[0]


def test_a_class_that_loses_dice_is_named_with_its_tile() -> None:
    gate = painted_gate()
    found = gate.judge(relabelled(gate, tile=2, num_pixels=3, label=2), "m.onnx", "fp16")
    assert found.label_agreement > 0.995
    (failure,) = found.failures
    for value in ("Necrosis", "0.50 Dice points", "1.0000", "0.9950", "tile_2"):
        assert value in failure


def test_the_limit_of_dice_depends_on_the_precision() -> None:
    gate = painted_gate()
    answers = relabelled(gate, tile=2, num_pixels=3, label=2)
    assert gate.judge(answers, "m.onnx", "int8").passed
    assert not gate.judge(answers, "m.onnx", "fp16").passed


def test_a_class_that_gains_dice_does_not_fail() -> None:
    gate = painted_gate()
    worse = relabelled(gate, tile=0, num_pixels=40, label=1)
    better = replace(gate, expected=replace(gate.expected, labels=worse.labels))
    found = better.judge(gate.expected, "m.onnx", "int8")
    necrosis = found.classes[2]
    assert necrosis.dice_loss < -0.05
    assert found.passed


def test_without_masks_torchs_labels_serve_as_masks() -> None:
    gate = painted_gate(masks=False)
    found = gate.judge(gate.expected, "m.onnx", "fp16")
    assert found.rarest_class == "Necrosis"
    assert [entry.num_pixels for entry in found.classes] == [2100, 2400, 300]
    assert {(entry.dice, entry.iou, entry.recall) for entry in found.classes} == {(1.0, 1.0, 1.0)}


def test_without_masks_a_lost_class_fails_however_rare_it_is() -> None:
    gate = painted_gate(masks=False)
    labels = gate.expected.labels.copy()
    labels[labels == 3] = 1
    labels[0, 0, :15] = 3
    rare = replace(gate, expected=replace(gate.expected, labels=labels))
    found = rare.judge(relabelled(rare, tile=0, num_pixels=15, label=1), "m.onnx", "fp16")
    assert found.label_agreement > 0.995
    (failure,) = found.failures
    assert "Necrosis loses 100.00 Dice points" in failure


def test_iou_scores_that_are_far_from_torchs_fail() -> None:
    gate = painted_gate()
    scores = gate.expected.iou_scores.copy()
    scores[1, 2] += 0.015
    answers = replace(gate.expected, iou_scores=scores)
    (failure,) = gate.judge(answers, "m.onnx", "fp16").failures
    assert "IoU score" in failure
    assert "0.0150" in failure
    assert gate.judge(answers, "m.onnx", "int8").passed


def test_confidence_that_is_far_from_torchs_on_average_fails() -> None:
    gate = painted_gate()
    confidence = gate.expected.confidence.copy()
    confidence[0] += 51  # of 255, on one tile of three
    answers = replace(gate.expected, confidence=confidence)
    (failure,) = gate.judge(answers, "m.onnx", "int8").failures
    assert "confidence differs by 0.0667" in failure


def test_low_resolution_probabilities_that_are_far_from_torchs_fail() -> None:
    gate = painted_gate()
    answers = replace(
        gate.expected, low_res_probabilities=gate.expected.low_res_probabilities + np.uint8(5)
    )
    (failure,) = gate.judge(answers, "m.onnx", "int8").failures
    assert "low_res_probabilities differs by 0.0196" in failure


def test_labels_that_are_no_class_fail_and_leave_the_scores_of_the_others_alone() -> None:
    gate = painted_gate()
    found = gate.judge(relabelled(gate, tile=0, num_pixels=2, label=9), "m.onnx", "int8")
    assert found.num_unknown_labels == 2
    assert "2 pixels have a label" in found.failures[0]
    assert [entry.dice for entry in found.classes] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["confidence", "low_res_probabilities"])
def test_an_artefact_without_logits_is_judged_by_its_other_outputs(name: str) -> None:
    gate = replace(painted_gate(), reference="ONNX Runtime", max_byte_difference=2)
    values = getattr(gate.expected, name).copy()
    values.flat[0] += 3
    answers = replace(gate.expected, low_res_logits=None, **{name: values})
    found = gate.judge(answers, "model.plan", "fp32", measured_with="TensorRT")
    assert found.max_logit_difference is None
    assert "3 of 255" in found.failures[0]


def test_unlabelled_pixels_do_not_count_in_the_scores() -> None:
    gate = painted_gate()
    answers = relabelled(gate, tile=2, num_pixels=3, label=2)
    masks = np.where(answers.labels != gate.expected.labels, 0, gate.tiles.masks)
    gate = replace(gate, tiles=replace(gate.tiles, masks=masks.astype(np.uint8)))
    assert gate.judge(answers, "m.onnx", "fp16").classes[2].dice == 1.0


def test_the_rarest_class_is_the_rarest_in_training_among_those_that_the_masks_have() -> None:
    gate = painted_gate(shares=(0.05, 0.8, 0.15))
    found = gate.judge(gate.expected, "m.onnx", "fp16")
    assert found.rarest_class == "Tumor"
    masks = np.where(gate.tiles.masks == 1, 0, gate.tiles.masks)
    gate = replace(gate, tiles=replace(gate.tiles, masks=masks.astype(np.uint8)))
    assert gate.judge(gate.expected, "m.onnx", "fp16").rarest_class == "Necrosis"


def test_recall_of_a_class_is_the_share_of_its_mask_that_is_found() -> None:
    gate = painted_gate()
    answers = relabelled(gate, tile=0, num_pixels=30, label=1)
    necrosis = gate.judge(answers, "m.onnx", "fp16").classes[2]
    assert (necrosis.torch_recall, necrosis.recall) == (1.0, pytest.approx(0.9))


@pytest.mark.parametrize(("value", "message"), [(np.nan, "1 NaN and 0"), (np.inf, "0 NaN and 1")])
def test_one_value_that_is_not_finite_fails(value: float, message: str) -> None:
    gate = painted_gate()
    logits = gate.expected.low_res_logits.copy()
    logits[1, 2, 3, 4] = value
    found = gate.judge(replace(gate.expected, low_res_logits=logits), "m.onnx", "fp16")
    assert message in found.failures[0]


def test_iou_scores_that_are_not_finite_fail() -> None:
    gate = painted_gate()
    scores = np.full_like(gate.expected.iou_scores, np.nan)
    assert gate.judge(replace(gate.expected, iou_scores=scores), "m.onnx", "fp16").num_nan == 9


def test_a_logit_that_differs_fails_float32_and_names_the_tile() -> None:
    gate = painted_gate()
    logits = gate.expected.low_res_logits.copy()
    logits[1, 2, 3, 4] += 0.01
    answers = replace(gate.expected, low_res_logits=logits)
    (failure,) = gate.judge(answers, "m.onnx", "fp32").failures
    assert "1.00e-02 on tile tile_1" in failure
    assert gate.judge(answers, "m.onnx", "fp16").passed


def test_an_artefact_may_be_judged_on_the_first_tiles_alone() -> None:
    gate = painted_gate()
    answers = relabelled(gate, tile=2, num_pixels=90, label=1)
    found = gate.judge(answers.first(2), "m.onnx", "bf16")
    assert (found.num_tiles, found.passed) == (2, True)


@pytest.mark.parametrize(
    ("emulation", "message"),
    [
        (
            EmulationParity(num_tiles=1, label_agreement=1.0, nonfinite={"neck": 4, "x": 1}),
            "neck is the first block with NaN",
        ),
        (EmulationParity(num_tiles=1, label_agreement=0.9, nonfinite={}), "90.0000% of the labels"),
    ],
)
def test_the_emulation_has_to_pass_too(emulation: EmulationParity, message: str) -> None:
    gate = painted_gate()
    (failure,) = gate.judge(gate.expected, "m.onnx", "fp16", emulation=emulation).failures
    assert message in failure


@pytest.mark.parametrize(
    ("precision", "agreement", "dice_loss"),
    [("fp32", 0.9999, 0.002), ("fp16", 0.995, 0.002), ("bf16", 0.995, 0.002), ("int8", 0.99, 0.01)],
)
def test_each_precision_has_its_tolerance(
    precision: Precision, agreement: float, dice_loss: float
) -> None:
    limits = Tolerances().limits(precision)
    assert (limits.agreement, limits.dice_loss) == (agreement, dice_loss)
