"""What the gate counts of two answers: scores per class, and differences of other outputs."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from export.gate.answers import Floats
from export.gate.schema import ClassParity
from export.gate.tiles import Images
from train.metrics import PooledConfusion, class_scores


def compare_classes(
    labels: Images, expected: Images, masks: Images | None, class_names: Sequence[str]
) -> tuple[ClassParity, ...]:
    """Compare labels per class.

    Args:
        labels: (N, H, W) uint8 in 1..C.
        expected: the reference's labels, of the same shape.
        masks: the right labels, of the same shape, 0 unlabelled; None takes the reference's labels,
            so that Dice is the agreement with them.
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


def max_finite_difference(found: Floats, expected: Floats) -> float:
    """The largest difference of two values where both are finite."""
    differences = np.abs(found - expected)
    return float(np.where(np.isfinite(differences), differences, 0.0).max(initial=0.0))


def byte_differences(found: Images, expected: Images) -> NDArray[np.int16]:
    """The differences of uint8 values, without their sign."""
    differences: NDArray[np.int16] = np.abs(found.astype(np.int16) - expected)
    return differences


def _scores(labels: Images, masks: Images, num_classes: int) -> dict[str, list[float | None]]:
    """Dice, IoU and recall per class, None where they are not defined."""
    confusion = PooledConfusion(num_classes)
    for found, mask in zip(labels, masks, strict=True):  # one tile at a time: int64 takes 8 bytes
        known = (found >= 1) & (found <= num_classes)
        confusion.update(
            torch.from_numpy(np.where(known, found, 1).astype(np.int64)),
            torch.from_numpy(np.where(known, mask, 0).astype(np.int64)),
        )
    matrix = confusion.compute()
    scores = class_scores(matrix)
    values = {
        "dice": scores.dice,
        "iou": scores.iou,
        "recall": matrix.diagonal().double() / matrix.sum(dim=1),  # NaN where there is no pixel
    }
    return {
        name: [None if np.isnan(value) else value for value in found.tolist()]
        for name, found in values.items()
    }
