"""The gate: whether an artefact answers as its reference does, measured on real pixels.

The reference of an ONNX graph is torch in float32, that of a TensorRT plan is ONNX Runtime with the
bundle's float32 graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from export.gate.answers import Answers
from export.gate.schema import (
    ArtefactParity,
    ClassParity,
    EmulationParity,
    Precision,
    Runtime,
    TileParity,
    Tolerances,
)
from export.gate.scores import byte_differences, compare_classes, max_finite_difference
from export.gate.tiles import ValidationTiles
from export.gate.verdict import failures_of


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The reference's answers, and what an artefact is held against.

    Where the tiles have no masks, the reference's labels take their place, so that a class cannot
    get lost.
    """

    tiles: ValidationTiles
    expected: Answers
    class_names: tuple[str, ...]
    class_shares: Sequence[float] | None = None
    """Each class's share of the training pixels: scores of the rarest are shown apart."""
    tolerances: Tolerances
    max_byte_difference: int | None = None
    """Largest allowed difference of a confidence or probability, where 255 is 1.0; None: any."""
    reference: Literal["torch", "ONNX Runtime"] = "torch"

    def judge(
        self,
        answers: Answers,
        file: str,
        precision: Precision,
        *,
        fp32_islands: tuple[str, ...] = (),
        emulation: EmulationParity | None = None,
        measured_with: Runtime = "ONNX Runtime",
    ) -> ArtefactParity:
        """Compare an artefact's answers, on all tiles or the first of them, with the reference's.

        Args:
            answers: on the first N of the gate's tiles.
            file: the artefact's name in the bundle.
            precision: of the artefact.
            fp32_islands: blocks of it that compute in float32.
            emulation: what its emulation in half precision gave.
            measured_with: what computed `answers`.
        """
        num_tiles = len(answers.labels)
        masks = None if self.tiles.masks is None else self.tiles.masks[:num_tiles]
        expected = self.expected.first(num_tiles)
        classes = compare_classes(answers.labels, expected.labels, masks, self.class_names)
        tiles = self._compare_tiles(answers, expected)
        floats = [answers.iou_scores, *_present(answers.low_res_logits)]
        labels = answers.labels
        measured = ArtefactParity(
            file=file,
            precision=precision,
            measured_with=measured_with,
            num_tiles=len(tiles),
            label_agreement=float(np.mean([tile.label_agreement for tile in tiles])),
            num_unknown_labels=int(((labels < 1) | (labels > len(self.class_names))).sum()),
            max_logit_difference=max(
                _present(*(t.max_logit_difference for t in tiles)), default=None
            ),
            max_iou_score_difference=max_finite_difference(answers.iou_scores, expected.iou_scores),
            **_differences(answers, expected),
            num_nan=sum(int(np.isnan(values).sum()) for values in floats),
            num_inf=sum(int(np.isinf(values).sum()) for values in floats),
            rarest_class=self._rarest_class(classes),
            fp32_islands=fp32_islands,
            emulation=emulation,
            classes=classes,
            tiles=tiles,
            failures=(),
        )
        limits = self.tolerances.limits(
            precision, has_masks=masks is not None, byte_difference=self.max_byte_difference
        )
        failures = failures_of(
            measured, limits, answers.labels, expected.labels, reference=self.reference
        )
        return measured.model_copy(update={"failures": tuple(failures)})

    def _compare_tiles(self, answers: Answers, expected: Answers) -> tuple[TileParity, ...]:
        agreement = (answers.labels == expected.labels).mean(axis=(1, 2)).tolist()
        found, wanted = answers.low_res_logits, expected.low_res_logits
        differences: list[float | None] = [None] * len(agreement)
        if found is not None and wanted is not None:
            differences = [
                max_finite_difference(one, other) for one, other in zip(found, wanted, strict=True)
            ]
        return tuple(
            TileParity(name=name, label_agreement=share, max_logit_difference=difference)
            for name, share, difference in zip(
                self.tiles.names, agreement, differences, strict=False
            )
        )

    def _rarest_class(self, classes: Sequence[ClassParity]) -> str | None:
        if self.class_shares is None:
            return None
        present = [
            (share, entry.name)
            for share, entry in zip(self.class_shares, classes, strict=True)
            if entry.num_pixels
        ]
        return min(present)[1] if present else None


def _differences(answers: Answers, expected: Answers) -> dict[str, Any]:
    """Of the confidence and the low-resolution probabilities: means as shares of 1, the largest."""
    confidence = byte_differences(answers.confidence, expected.confidence)
    probabilities = byte_differences(answers.low_res_probabilities, expected.low_res_probabilities)
    return {
        "mean_confidence_difference": float(confidence.mean() / 255),
        "mean_probability_difference": float(probabilities.mean() / 255),
        "max_byte_difference": int(max(confidence.max(), probabilities.max())),
    }


def _present(*values: Any) -> list[Any]:
    return [value for value in values if value is not None]
