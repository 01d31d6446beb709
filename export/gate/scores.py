"""What the gate counts of two answers: scores per class, IoU scores and confidence.

It needs no logits, so that a TensorRT plan, which gives none, is held to the same limits.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.gate.schema import ClassParity, Limits
from export.gate.tiles import Images
from train.metrics import class_scores

Scores = NDArray[np.floating[Any]]


def compare_classes(
    labels: Images, expected: Images, masks: Images | None, class_names: Sequence[str]
) -> tuple[ClassParity, ...]:
    """Compare labels per class.

    Args:
        labels: (N, H, W) uint8 in 1..C.
        expected: the reference's labels, alike.
        masks: what is right, alike, 0 unlabelled; None takes the reference's labels, so that
            Dice is the agreement with them.
        class_names: the C classes.
    """
    masks = expected if masks is None else masks
    before, after = (_scores(found, masks, len(class_names)) for found in (expected, labels))
    compared = []
    for index, name in enumerate(class_names):
        of_class = expected == index + 1
        compared.append(
            ClassParity(
                name=name,
                num_pixels=int((masks == index + 1).sum()),
                agreement=float((labels[of_class] == index + 1).mean()) if of_class.any() else None,
                **{f"torch_{score}": values[index] for score, values in before.items()},
                **{score: values[index] for score, values in after.items()},
            )
        )
    return tuple(compared)


def max_iou_score_difference(found: Scores, expected: Scores) -> float:
    """The largest difference of an IoU score, (N, C), where both are finite."""
    differences = np.abs(found - expected)
    return float(np.where(np.isfinite(differences), differences, 0.0).max(initial=0.0))


def mean_confidence_difference(found: Images, expected: Images) -> float:
    """The mean difference of confidence, (N, H, W) uint8 with 255 = 1.0, as a share of 1."""
    return float(np.abs(found.astype(np.int16) - expected).mean() / 255)


def score_failures(
    classes: Sequence[ClassParity],
    labels: Images,
    expected: Images,
    tile_names: Sequence[str],
    limit: float,
) -> Iterator[str]:
    """Say which classes lose more Dice than `limit`, and on which tile most."""
    for label, entry in enumerate(classes, start=1):
        if entry.dice_loss > limit:
            differs = ((labels == label) != (expected == label)).sum(axis=(1, 2))
            yield (
                f"class {entry.name} loses {100 * entry.dice_loss:.2f} Dice points "
                f"({entry.torch_dice:.4f} to {entry.dice:.4f}), at most {100 * limit:.2f} may be "
                f"lost; most on tile {tile_names[int(differs.argmax())]}"
            )


def difference_failures(
    iou_score_difference: float, confidence_difference: float, limits: Limits
) -> Iterator[str]:
    """Say whether IoU scores or confidence are further from the reference than allowed."""
    if iou_score_difference > limits.iou_score_difference:
        yield (
            f"an IoU score differs by {iou_score_difference:.4f}, at most "
            f"{limits.iou_score_difference:g} is allowed"
        )
    if confidence_difference > limits.confidence_difference:
        yield (
            f"confidence differs by {confidence_difference:.4f} on average, at most "
            f"{limits.confidence_difference:g} is allowed"
        )


def _scores(labels: Images, masks: Images, num_classes: int) -> dict[str, list[float | None]]:
    """Dice, IoU and recall per class, None where they are not defined."""
    confusion = _confusion(labels, masks, num_classes)
    scores = class_scores(torch.from_numpy(confusion))
    counts = confusion.sum(axis=1)
    recall = confusion.diagonal() / np.where(counts, counts, np.nan)
    found: dict[str, list[float]] = {
        "dice": scores.dice.tolist(),
        "iou": scores.iou.tolist(),
        "recall": recall.tolist(),
    }
    return {
        name: [None if np.isnan(value) else float(value) for value in values]
        for name, values in found.items()
    }


def _confusion(labels: Images, masks: Images, num_classes: int) -> NDArray[np.int64]:
    """(C, C) mask x label; unlabelled pixels are left out."""
    known = (masks > 0) & (labels > 0) & (labels <= num_classes)
    pairs = (masks[known].astype(np.int64) - 1) * num_classes + labels[known] - 1
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
