"""All measures of an encoder, on tiles that are the same for every encoder: see `tiles`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from train.data.folder import Split
from train.pretraining.footprints import Footprint
from train.pretraining.magnification.embedding import Square, embed, read_squares
from train.pretraining.magnification.labelled import LabelledSlides
from train.pretraining.magnification.probe import (
    Array,
    CaseBootstrap,
    Embedded,
    Probe,
    Retrieval,
    balanced_accuracy,
    fit_probe,
    retrieve,
    scale_leakage,
)
from train.pretraining.magnification.segmentation import (
    Map,
    MapScores,
    cohen_kappa,
    fit_head,
    mean_iou,
    predict_map,
    require_patches,
    score_maps,
    true_map,
)
from train.pretraining.magnification.settings import EvaluationSettings
from train.pretraining.magnification.tiles import COLORS, EvaluationTiles, TileSet


@dataclass(frozen=True)
class ProbeResult:
    """A probe trained at each scale and tested at each scale."""

    matrix: Array
    """Balanced accuracy, (trained at, tested at)."""
    resampled: Array
    """The same for every resample of cases, (resamples, trained at, tested at)."""
    leakage: float


@dataclass(frozen=True)
class SegmentationResult:
    """Maps of a linear head that was trained at the coarsest scale."""

    scores: tuple[MapScores, ...]
    """At each scale."""
    consistency: float
    """Mean IoU of the coarsest scale's maps and the finest scale's."""
    kappa: float
    """Cohen's kappa of the same."""


@dataclass(frozen=True)
class EncoderResult:
    """All measures of one encoder of one seed."""

    probes: dict[str, ProbeResult]
    """Of each of `COLORS`, tiles with the same pixels."""
    field_probes: dict[str, ProbeResult]
    """Of each of `COLORS`, tiles with the same field; empty where that rule is left out."""
    retrieval: dict[str, Retrieval]
    """Of each of `COLORS`; each scale's mean over training tiles is taken off."""
    segmentation: dict[str, SegmentationResult]
    """Of each of `COLORS`."""


class Evaluation:
    """Tiles read once, and every encoder measured on them.

    Raises:
        SourceError: a split has too few labelled tiles, or tiles of one class, at some scale, or
            nothing to segment.
    """

    def __init__(self, slides: LabelledSlides, settings: EvaluationSettings) -> None:
        self._slides, self._settings = slides, settings
        self._tiles = EvaluationTiles(slides, settings)
        require_patches(slides, self._tiles.squares, settings.tile_px // settings.patch_px)
        self.num_classes = len(slides.classes)
        self._places_cases = np.array(
            [slides.info(slide).group for slide, _ in self._tiles.squares["test"]]
        )
        groups = [parts["test"].groups for parts in self._tiles.same_pixels.values()]
        self.bootstrap = CaseBootstrap(np.concatenate([*groups, self._places_cases]))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the settings and of every tile that encoders see."""
        return self._tiles.fingerprint

    def measure(self, encoder: nn.Module) -> EncoderResult:
        """Measure one encoder: a timm vision transformer with dynamic image size."""
        cast(Any, encoder).eval()
        field = self._tiles.same_field
        return EncoderResult(
            probes={c: self._probe(encoder, self._tiles.same_pixels, c) for c in COLORS},
            field_probes={c: self._probe(encoder, field, c) for c in COLORS if field},
            retrieval={c: self._retrieve(encoder, c) for c in COLORS},
            segmentation={c: self._segment(encoder, c) for c in COLORS},
        )

    def _probe(
        self, encoder: nn.Module, rule: dict[float, dict[Split, TileSet]], color: str
    ) -> ProbeResult:
        found: dict[float, dict[Split, Embedded]] = {
            scale: {
                split: Embedded(embed(encoder, part.pictures[color]), part.labels, part.groups)
                for split, part in parts.items()
            }
            for scale, parts in rule.items()
        }
        probes: list[Probe] = [
            fit_probe(parts["training"], parts["validation"]) for parts in found.values()
        ]
        count = len(found)
        matrix = np.zeros((count, count))
        resampled = np.zeros((len(self.bootstrap.draws), count, count))
        for row, probe in enumerate(probes):
            for column, parts in enumerate(found.values()):
                test = parts["test"]
                predicted = probe.predict(test.features)
                matrix[row, column] = balanced_accuracy(test.labels, predicted)
                resampled[:, row, column] = self.bootstrap.balanced_accuracies(
                    test.labels, predicted, test.groups, self.num_classes
                )
        leakage = scale_leakage(
            {scale: parts["training"] for scale, parts in found.items()},
            {scale: parts["test"] for scale, parts in found.items()},
        )
        return ProbeResult(matrix, resampled, leakage)

    def _retrieve(self, encoder: nn.Module, color: str) -> Retrieval:
        """Find a coarse tile by the mean embedding of the fine tiles that fill it."""
        test = self._places(encoder, "test", color)
        means = [rows.mean(axis=0) for rows in self._places(encoder, "training", color)]
        queries, gallery = test[0] - means[0], test[1] - means[1]
        return retrieve(queries, gallery, self.bootstrap, self._places_cases)

    def _places(
        self, encoder: nn.Module, split: Split, color: str
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Embeddings of squares by their fine tiles, and at the coarse scale: (N, D) each."""
        settings = self._settings
        size, coarse, finest = settings.tile_px, settings.scales[0], settings.scales[-1]
        squares = self._tiles.squares[split]
        per_side = max(1, int(size * coarse / (size * finest) + 1e-6))
        gallery = self._read(squares, color)
        fine = [(slide, part) for slide, square in squares for part in _parts(square, per_side)]
        queries = self._read(fine, color)
        embedded = embed(encoder, queries).reshape(len(squares), per_side**2, -1).mean(axis=1)
        return embedded, embed(encoder, gallery)

    def _read(self, squares: Sequence[Square], color: str) -> list[NDArray[np.uint8]]:
        pictures = read_squares(self._slides.source, squares, self._settings.tile_px)
        return [self._tiles.recolor(picture, color) for picture in pictures]

    def _segment(self, encoder: nn.Module, color: str) -> SegmentationResult:
        settings, slides = self._settings, self._slides

        def read(squares: Sequence[Square]) -> list[NDArray[np.uint8]]:
            return self._read(squares, color)

        parts = (self._tiles.squares["training"], self._tiles.squares["validation"])
        head = fit_head(encoder, slides, parts, read)
        truth = [true_map(slides, *square) for square in self._tiles.squares["test"]]
        maps: list[list[Map]] = [
            [
                predict_map(encoder, head, *square, settings.tile_px * mpp, read)
                for square in self._tiles.squares["test"]
            ]
            for mpp in settings.scales
        ]
        labelled = np.concatenate([m.ravel() for m in truth]) > 0
        first, last = (np.concatenate([m.ravel() for m in maps[i]])[labelled] for i in (0, -1))
        return SegmentationResult(
            scores=tuple(score_maps(found, truth, self.num_classes) for found in maps),
            consistency=mean_iou(first, last, self.num_classes),
            kappa=cohen_kappa(first, last),
        )


def _parts(square: Footprint, per_side: int) -> list[Footprint]:
    side = square.side_um / per_side
    return [
        Footprint(square.y_um + row * side, square.x_um + column * side, side)
        for row in range(per_side)
        for column in range(per_side)
    ]
