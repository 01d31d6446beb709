import pytest
import torch
import torch.nn.functional as F
from monai.losses.dice import DiceLoss
from monai.losses.focal_loss import FocalLoss

from train.fitting.losses import SegmentationLoss, class_weights, dice_loss, focal_terms, mask_iou
from train.model.segmenter import SegmenterOutput, upsample
from train.settings import LossSettings

NUM_CLASSES = 3


def output_for(labels: torch.Tensor, sharpness: float = 10.0) -> SegmenterOutput:
    """Masks that predict `labels`, at a quarter of their resolution."""
    low_res = labels[:, ::4, ::4]
    logits = F.one_hot(low_res, 1 + NUM_CLASSES).movedim(-1, 1).float()
    return SegmenterOutput(sharpness * (2 * logits - 1), torch.ones(len(labels), 1 + NUM_CLASSES))


@pytest.fixture
def labels() -> torch.Tensor:
    quadrants = torch.tensor([[1, 2], [3, 1]]).repeat_interleave(8, 0).repeat_interleave(8, 1)
    return quadrants.expand(2, -1, -1)


def test_a_perfect_prediction_costs_less_than_a_wrong_one(labels: torch.Tensor):
    loss = SegmentationLoss(LossSettings())
    right = loss(output_for(labels), labels)
    wrong = loss(output_for(labels % NUM_CLASSES + 1), labels)
    for part in ("dice_loss", "focal_loss", "iou_loss"):
        assert right[part] < wrong[part]


def test_the_parts_are_weighted_as_in_equation_7(labels: torch.Tensor):
    settings = LossSettings(focal_weight=0.2, iou_weight=0.5)
    parts = SegmentationLoss(settings)(output_for(labels, sharpness=0.3), labels)
    expected = 0.8 * parts["dice_loss"] + 0.2 * parts["focal_loss"] + 0.5 * parts["iou_loss"]
    torch.testing.assert_close(parts["loss"], expected)


def test_without_focal_the_dice_loss_has_all_the_weight(labels: torch.Tensor):
    settings = LossSettings(focal=False, iou_weight=0.0)
    parts = SegmentationLoss(settings)(output_for(labels, sharpness=0.3), labels)
    assert set(parts) == {"loss", "dice_loss"}
    torch.testing.assert_close(parts["loss"], parts["dice_loss"])


def test_unlabelled_pixels_count_nowhere(labels: torch.Tensor):
    output = output_for(labels, sharpness=1.0)
    partly = labels.clone()
    partly[:, :, 8:] = 0
    changed = SegmenterOutput(output.low_res_logits.clone(), output.iou_scores)
    # Away from the labels' edge, where upsampling mixes neighbours.
    changed.low_res_logits[:, :, :, -1] += 5 * torch.randn(2, 1 + NUM_CLASSES, 4)
    loss = SegmentationLoss(LossSettings())
    torch.testing.assert_close(loss(changed, partly), loss(output, partly))


def test_an_image_without_labels_gives_a_finite_loss(labels: torch.Tensor):
    parts = SegmentationLoss(LossSettings())(output_for(labels), torch.zeros_like(labels))
    assert all(torch.isfinite(value) for value in parts.values())


def test_true_iou_counts_pixels_above_one_half():
    probabilities = torch.tensor([0.9, 0.6, 0.4, 0.1]).reshape(1, 1, 2, 2)
    target = torch.tensor([True, False, True, False]).reshape(1, 1, 2, 2)
    assert mask_iou(probabilities, target).item() == pytest.approx(1 / 3)


def test_dice_of_pooled_pixels_ignores_a_class_that_one_image_lacks():
    labels = torch.ones(2, 16, 16, dtype=torch.long)
    labels[0, :, 8:] = 2
    labels[1, :, 8:] = 3
    output = output_for(labels)
    per_image, pooled = (
        SegmentationLoss(LossSettings(dice_per_image=choice))(output, labels)["dice_loss"]
        for choice in (True, False)
    )
    assert per_image > pooled + 0.2


@pytest.mark.parametrize("per_image", [True, False])
def test_dice_loss_and_its_gradient_are_monais(per_image: bool):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, NUM_CLASSES, 8, 8, generator=generator).requires_grad_()
    target = torch.rand(2, NUM_CLASSES, 8, 8, generator=generator) > 0.7
    target[1, 0] = False
    ours = dice_loss(logits.sigmoid(), target, per_image=per_image)
    monais = DiceLoss(batch=not per_image)(logits.sigmoid(), target.float())
    torch.testing.assert_close(ours, monais)
    gradients = (torch.autograd.grad(loss, logits)[0] for loss in (ours, monais))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_and_its_gradient_are_monais_also_for_logits_far_from_zero(gamma: float):
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(2, NUM_CLASSES, 8, 8, generator=generator)
    logits.requires_grad_()
    target = torch.rand(2, NUM_CLASSES, 8, 8, generator=generator) > 0.7
    ours = focal_terms(logits, target, gamma)
    monais = FocalLoss(gamma=gamma, reduction="none")(logits, target.float())
    torch.testing.assert_close(ours, monais)
    gradients = (torch.autograd.grad(terms.sum(), logits)[0] for terms in (ours, monais))
    torch.testing.assert_close(*gradients)


def test_focal_loss_of_a_partly_labelled_tile_has_the_gradient_of_sampaths():
    """SAM-Path masks logits and target, then takes MONAI's mean: over all pixels."""
    generator = torch.Generator().manual_seed(0)
    low_res = torch.randn(2, 1 + NUM_CLASSES, 4, 4, generator=generator).requires_grad_()
    labels = torch.randint(1, 1 + NUM_CLASSES, (2, 16, 16), generator=generator)
    labels[:, :, 8:] = 0
    labels[1, 4:] = 0
    output = SegmenterOutput(low_res, torch.ones(2, 1 + NUM_CLASSES))
    ours = SegmentationLoss(LossSettings(focal_weight=1.0, iou_weight=0.0))(output, labels)["loss"]
    labelled = (labels > 0).unsqueeze(1)
    target = F.one_hot(labels, 1 + NUM_CLASSES).movedim(-1, 1).float()
    sampaths = FocalLoss(include_background=False)(upsample(low_res, 16) * labelled, target)
    gradients = (torch.autograd.grad(loss, low_res)[0] for loss in (ours, sampaths))
    torch.testing.assert_close(*gradients)


def test_the_loss_of_a_batch_is_the_mean_of_its_images():
    """So that several processes learn what one does, whatever is unlabelled where."""
    generator = torch.Generator().manual_seed(0)
    low_res = torch.randn(2, 1 + NUM_CLASSES, 4, 4, generator=generator)
    labels = torch.randint(1, 1 + NUM_CLASSES, (2, 16, 16), generator=generator)
    labels[1, 4:] = 0
    loss = SegmentationLoss(LossSettings())
    outputs = [
        SegmenterOutput(part, torch.ones(len(part), 1 + NUM_CLASSES))
        for part in (low_res, low_res[:1], low_res[1:])
    ]
    both, first, second = (
        loss(output, part)["loss"]
        for output, part in zip(outputs, (labels, labels[:1], labels[1:]), strict=True)
    )
    torch.testing.assert_close(both, (first + second) / 2)


def test_class_weights_are_by_one_over_the_share_and_their_mean_is_one():
    frequencies = torch.tensor([0.64, 0.32, 0.04])
    inverse, root = (class_weights(choice, frequencies) for choice in ("inverse", "sqrt"))
    torch.testing.assert_close(inverse / inverse[0], torch.tensor([1.0, 2.0, 16.0]))
    torch.testing.assert_close(root.square() / root[0].square(), inverse / inverse[0])
    assert float(inverse.mean()) == pytest.approx(1)


def test_class_weights_count_in_dice_and_focal_loss():
    torch.manual_seed(0)
    frequencies = torch.tensor([0.64, 0.32, 0.04])
    labels = torch.randint(1, 4, (2, 16, 16))
    output = SegmenterOutput(torch.randn(2, 4, 4, 4), torch.zeros(2, 4))
    parts = SegmentationLoss(LossSettings(class_weights="inverse"), frequencies)(output, labels)
    logits = upsample(output.low_res_logits, 16)
    target = labels.unsqueeze(1) == torch.arange(1, 4).reshape(1, -1, 1, 1)
    weights = class_weights("inverse", frequencies)
    errors = [
        dice_loss(logits.softmax(dim=1)[:, [1 + c]], target[:, [c]], per_image=True)
        for c in range(3)
    ]
    torch.testing.assert_close(parts["dice_loss"], (weights * torch.stack(errors)).mean())
    terms = focal_terms(logits[:, 1:], target, 2.0).mean(dim=(0, 2, 3))
    torch.testing.assert_close(parts["focal_loss"], (weights * terms).mean())
