"""The gate of a TensorRT plan: its answers against ONNX Runtime's, by the limits of its export."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.gate.scores import (
    compare_classes,
    difference_failures,
    max_iou_score_difference,
    mean_confidence_difference,
    score_failures,
)
from export.gate.tiles import ValidationTiles
from export.tensorrt.plan import EnginePlan
from export.tensorrt.report import Comparison

Answers = dict[str, NDArray[Any]]
"""The model's outputs by name, over all images."""

_BYTES = ("confidence", "low_res_probabilities")


@dataclass(frozen=True, kw_only=True)
class EngineGate:
    """What a plan is held against.

    Where the tiles have no masks, ONNX Runtime's labels take their place, so that a class cannot
    get lost.
    """

    tiles: ValidationTiles
    expected: Answers
    class_names: tuple[str, ...]
    plan: EnginePlan

    def compare(self, answers: Answers) -> tuple[Comparison, tuple[str, ...]]:
        """Compare the answers on all tiles; also say what keeps the plan from being served."""
        expected, labels = self.expected, answers["labels"]
        floats = [answer for answer in answers.values() if answer.dtype.kind == "f"]
        found = Comparison(
            label_agreement=float((labels == expected["labels"]).mean()),
            num_nonfinite=sum(int((~np.isfinite(answer)).sum()) for answer in floats),
            num_unknown_labels=int(((labels < 1) | (labels > len(self.class_names))).sum()),
            max_iou_score_difference=max_iou_score_difference(
                answers["iou_scores"], expected["iou_scores"]
            ),
            mean_confidence_difference=mean_confidence_difference(
                answers["confidence"], expected["confidence"]
            ),
            mean_probability_difference=mean_confidence_difference(
                answers["low_res_probabilities"], expected["low_res_probabilities"]
            ),
            max_byte_difference=max(
                int(np.abs(answers[name].astype(np.int16) - expected[name]).max())
                for name in _BYTES
            ),
            classes=compare_classes(labels, expected["labels"], self.tiles.masks, self.class_names),
        )
        return found, tuple(self._failures(found, answers))

    def _failures(self, found: Comparison, answers: Answers) -> Iterator[str]:
        plan, masks = self.plan, self.tiles.masks
        limits = plan.tolerances.limits(plan.precision, has_masks=masks is not None)
        if found.num_nonfinite:
            yield f"{found.num_nonfinite} NaN or infinite values"
        if found.num_unknown_labels:
            yield f"{found.num_unknown_labels} pixels with an unknown label"
        if found.label_agreement < limits.agreement:
            yield (
                f"{found.label_agreement:.4%} of the labels are ONNX Runtime's, expected at least "
                f"{100 * limits.agreement:g}%"
            )
        labels = answers["labels"], self.expected["labels"]
        yield from score_failures(found.classes, *labels, self.tiles.names, limits.dice_loss)
        yield from difference_failures(
            found.max_iou_score_difference, found.mean_confidence_difference, limits
        )
        if found.mean_probability_difference > limits.confidence_difference:
            yield (
                f"low-resolution probabilities differ by {found.mean_probability_difference:.4f} "
                f"on average, at most {limits.confidence_difference:g} is allowed"
            )
        if found.max_byte_difference > plan.max_byte_difference:
            yield (
                f"a confidence or probability differs by {found.max_byte_difference} of 255, at "
                f"most {plan.max_byte_difference} is allowed"
            )
