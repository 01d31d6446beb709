"""The gate: whether an artefact answers as torch does in float32, measured on real pixels."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from rich.console import Console
from rich.progress import track

from export.gate.schema import (
    ArtefactParity,
    ClassParity,
    EmulationParity,
    Limits,
    Precision,
    Runtime,
    TileParity,
    Tolerances,
)
from export.gate.scores import (
    Scores,
    compare_classes,
    difference_failures,
    max_iou_score_difference,
    mean_confidence_difference,
    score_failures,
)
from export.gate.tiles import Images, ValidationTiles
from export.gate.tiles import parity_images as parity_images
from export.graph.reference import Deployable, DeployableOutput
from export.graph.to_onnx import PARITY_OUTPUT
from serve.contract.openvino import GraphPrecision, OpenVinoModel

ANSWERS = ("labels", "confidence", PARITY_OUTPUT, "iou_scores")
"""The graph's outputs that `Answers` holds, in its order."""


@dataclass(frozen=True)
class Answers:
    """A runtime's answers on all tiles.

    labels and confidence: (N, H, W) uint8. logits: (N, C, H/4, W/4). iou_scores: (N, C).
    """

    labels: Images
    confidence: Images
    logits: Scores
    iou_scores: Scores


def torch_answers(deployable: Deployable, images: Images) -> Answers:
    """Run torch in float32, tile by tile: at 1024 pixels its attention takes 2 GB a tile."""

    def run(batch: Images) -> tuple[Any, ...]:
        with torch.inference_mode():
            output = DeployableOutput(*deployable(torch.from_numpy(batch)))
        return tuple(getattr(output, name).numpy() for name in ANSWERS)

    return _in_batches(run, [images[i : i + 1] for i in range(len(images))], "torch")


def onnx_answers(path: Path, images: Images) -> Answers:
    """Run ONNX Runtime's CPU provider; the graph must still have its `low_res_logits`.

    Args:
        path: the graph.
        images: (N, H, W, 3) uint8, RGB.
    """
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return _in_batches(
        lambda batch: tuple(session.run(list(ANSWERS), {"image": batch})),
        _alone_then_together(images),
        f"{path.name} in ONNX Runtime",
    )


def openvino_answers(path: Path, images: Images, precision: GraphPrecision) -> Answers:
    """Run OpenVINO as the service does; see `onnx_answers`."""
    model = OpenVinoModel(path, precision)

    def run(batch: Images) -> tuple[Any, ...]:
        found = model.run(batch, ANSWERS)
        return tuple(found[name] for name in ANSWERS)

    return _in_batches(run, _alone_then_together(images), f"{path.name} in OpenVINO")


def _alone_then_together(images: Images) -> list[Images]:
    """One tile, then three at a time: the graph must not have fixed its batch."""
    return [images[:1], *(images[i : i + 3] for i in range(1, len(images), 3))]


def _in_batches(
    run: Callable[[Images], tuple[Any, ...]], batches: Sequence[Images], title: str
) -> Answers:
    shown = track(batches, title, console=Console(stderr=True), transient=True)
    parts = [run(batch) for batch in shown]
    return Answers(*(np.concatenate(part) for part in zip(*parts, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Torch's answers, and what an artefact is held against."""

    tiles: ValidationTiles
    expected: Answers
    class_names: tuple[str, ...]
    class_shares: Sequence[float]
    """Each class's share of the training pixels: the rarest is looked at apart."""
    tolerances: Tolerances

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
        """Compare an artefact's answers, on all tiles or the first of them, with torch's."""
        num_tiles = len(answers.labels)
        masks = None if self.tiles.masks is None else self.tiles.masks[:num_tiles]
        expected = self.expected
        classes = compare_classes(
            answers.labels, expected.labels[:num_tiles], masks, self.class_names
        )
        tiles = self._compare_tiles(answers)
        values = np.concatenate([answers.logits.ravel(), answers.iou_scores.ravel()])
        measured = ArtefactParity(
            file=file,
            precision=precision,
            measured_with=measured_with,
            num_tiles=len(tiles),
            label_agreement=float(np.mean([tile.label_agreement for tile in tiles])),
            max_logit_difference=max(tile.max_logit_difference for tile in tiles),
            max_iou_score_difference=max_iou_score_difference(
                answers.iou_scores, expected.iou_scores[:num_tiles]
            ),
            mean_confidence_difference=mean_confidence_difference(
                answers.confidence, expected.confidence[:num_tiles]
            ),
            num_nan=int(np.isnan(values).sum()),
            num_inf=int(np.isinf(values).sum()),
            rarest_class=self._rarest_class(classes),
            fp32_islands=fp32_islands,
            emulation=emulation,
            classes=classes,
            tiles=tiles,
            failures=(),
        )
        failures = tuple(self._failures(measured, answers.labels))
        return measured.model_copy(update={"failures": failures})

    def _compare_tiles(self, answers: Answers) -> tuple[TileParity, ...]:
        num_tiles = len(answers.labels)
        agreement = (answers.labels == self.expected.labels[:num_tiles]).mean(axis=(1, 2))
        differences = np.abs(answers.logits - self.expected.logits[:num_tiles])
        differences = np.where(np.isfinite(differences), differences, 0.0).max(axis=(1, 2, 3))
        rows = zip(self.tiles.names, agreement, differences, strict=False)
        return tuple(
            TileParity(name=name, label_agreement=float(a), max_logit_difference=float(d))
            for name, a, d in rows
        )

    def _rarest_class(self, classes: Sequence[ClassParity]) -> str | None:
        present = [
            (share, entry.name)
            for share, entry in zip(self.class_shares, classes, strict=True)
            if entry.num_pixels and math.isfinite(share)
        ]
        return min(present)[1] if present else None

    def _failures(self, found: ArtefactParity, labels: Images) -> Iterator[str]:
        has_masks = self.tiles.masks is not None
        limits = self.tolerances.limits(found.precision, has_masks=has_masks)
        worst = min(found.tiles, key=lambda tile: tile.label_agreement)
        if found.num_nan or found.num_inf:
            yield f"{found.num_nan} NaN and {found.num_inf} infinite logits and IoU scores"
        if found.label_agreement < limits.agreement:
            yield (
                f"{found.label_agreement:.4%} of the labels are torch's, expected at least "
                f"{100 * limits.agreement:g}%; fewest on tile {worst.name} "
                f"({worst.label_agreement:.4%}), most of them lost by "
                f"{self._class_that_loses_most(labels)}"
            )
        yield from score_failures(
            found.classes,
            labels,
            self.expected.labels[: len(labels)],
            self.tiles.names,
            limits.dice_loss,
        )
        yield from difference_failures(
            found.max_iou_score_difference, found.mean_confidence_difference, limits
        )
        difference = limits.logit_difference
        if difference is not None and not found.max_logit_difference < difference:
            worst = max(found.tiles, key=lambda tile: tile.max_logit_difference)
            yield (
                f"a logit differs by {found.max_logit_difference:.2e} on tile {worst.name}, "
                f"expected less than {difference:.0e}"
            )
        if found.emulation is not None:
            yield from _emulation_failures(found.emulation, limits)

    def _class_that_loses_most(self, labels: Images) -> str:
        expected = self.expected.labels[: len(labels)]
        lost = np.bincount(expected[labels != expected], minlength=1 + len(self.class_names))
        return self.class_names[int(lost[1:].argmax())]


def _emulation_failures(emulation: EmulationParity, limits: Limits) -> Iterator[str]:
    where = f"with each node rounded, on {emulation.num_tiles} tiles,"
    if emulation.nonfinite:
        block, count = next(iter(emulation.nonfinite.items()))
        yield f"{where} {block} is the first block with NaN or infinite values ({count})"
    if emulation.label_agreement < limits.agreement:
        yield (
            f"{where} {emulation.label_agreement:.4%} of the labels are torch's, expected at "
            f"least {100 * limits.agreement:g}%"
        )
