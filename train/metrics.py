"""Dice and IoU of each class from the pixels of a whole data set pooled.

Table 1 of arXiv 2604.13479 fits pooled counts exactly (IoU = Dice / (2 - Dice) in its rows), so
the mean is the plain mean over classes of pooled values, and unlabelled pixels are ignored.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix


class ClassScores(NamedTuple):
    """Scores of each class, (C,) float32 in [0, 1]; NaN for a class without a labelled pixel.

    Of such a class nothing is known: a single wrong pixel would turn 1 into 0 (our choice).
    """

    dice: Tensor
    iou: Tensor

    @property
    def mean_dice(self) -> float:
        """Plain mean over the classes that are there."""
        return float(self.dice.nanmean())

    @property
    def mean_iou(self) -> float:
        """Plain mean over the classes that are there."""
        return float(self.iou.nanmean())


class PooledConfusion(MulticlassConfusionMatrix):
    """Confusion matrix (C, C), target x prediction, over labels 1..C; label 0 is ignored."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, ignore_index=-1, validate_args=False)

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Add labels (B, H, W) int64: predicted in 1..C, target in 0..C."""
        super().update(predicted - 1, target - 1)


def image_confusion(predicted: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """The matrix (C, C) int64 of one image: labels (H, W) predicted in 1..C, target in 0..C."""
    confusion = PooledConfusion(num_classes)
    confusion.update(predicted[None], target[None])
    return Tensor(confusion.compute()).long()


def class_scores(confusion: Tensor) -> ClassScores:
    """Dice = 2 TP / (2 TP + FP + FN) and IoU = TP / (TP + FP + FN) from a (C, C) matrix."""
    matrix = confusion.double()
    true_positives = matrix.diagonal()
    target = matrix.sum(dim=1)
    errors = matrix.sum(dim=0) + target - 2 * true_positives
    dice = 2 * true_positives / (2 * true_positives + errors)
    iou = true_positives / (true_positives + errors)
    absent = target == 0
    return ClassScores(
        dice.masked_fill(absent, torch.nan).to(torch.float32),
        iou.masked_fill(absent, torch.nan).to(torch.float32),
    )
