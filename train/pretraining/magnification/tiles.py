"""The tiles on which encoders are measured: read once, the same for every encoder."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from train.data.folder import Split
from train.errors import SourceError
from train.pretraining.footprints import Footprint
from train.pretraining.magnification.embedding import color_matched, color_target, read_squares
from train.pretraining.magnification.labelled import (
    LabelledSlides,
    LabelledTile,
    groups_of,
    labelled_tiles,
)
from train.pretraining.magnification.settings import EvaluationSettings

COLORS = ("as is", "colour-matched")
_MIN_TILES = 10
_SPLITS: tuple[Split, ...] = ("training", "validation", "test")


@dataclass(frozen=True)
class TileSet:
    """Pictures of one split and scale, in each of `COLORS`."""

    pictures: dict[str, list[NDArray[np.uint8]]]
    labels: NDArray[np.int64]
    groups: NDArray[np.str_]


class EvaluationTiles:
    """Labelled tiles at every scale, and squares of the coarse tiles' side.

    Raises:
        SourceError: a split has too few labelled tiles, or tiles of one class, at some scale.
    """

    def __init__(self, slides: LabelledSlides, settings: EvaluationSettings) -> None:
        self._slides, self._settings = slides, settings
        coarse = settings.scales[0]
        tiles = self._tiles("training", settings.tile_px * coarse, coarse)
        self._require("training", coarse, np.array([tile.label for tile in tiles]))
        self._target = color_target(
            read_squares(slides.source, [tile.square for tile in tiles], settings.tile_px)
        )
        side_px = settings.tile_px
        self.same_pixels = {
            scale: {s: self._read(s, side_px * scale, scale, side_px) for s in _SPLITS}
            for scale in settings.scales
        }
        self.same_field = {
            scale: {
                s: self._read(s, side_px * coarse, scale, settings.field_px(scale)) for s in _SPLITS
            }
            for scale in settings.scales
            if settings.same_field
        }
        self._check()
        self.squares = {split: self._cut_squares(split) for split in _SPLITS}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the settings and of every tile that encoders see."""
        digest = hashlib.sha256(repr(self._settings).encode())
        for rule in (self.same_pixels, self.same_field):
            for parts in rule.values():
                for part in parts.values():
                    digest.update(part.labels.tobytes())
                    for picture in part.pictures["as is"]:
                        digest.update(picture.tobytes())
        digest.update(repr(self.squares).encode())
        return digest.hexdigest()

    def recolor(self, picture: NDArray[np.uint8], color: str) -> NDArray[np.uint8]:
        """A picture in one of `COLORS`."""
        return picture if color == "as is" else color_matched(picture, self._target)

    def _tiles(self, split: Split, side_um: float, mpp: float) -> list[LabelledTile]:
        settings = self._settings
        return labelled_tiles(
            self._slides,
            split,
            side_um,
            purity=settings.purity,
            max_per_slide=settings.tiles_per_slide,
            finest_mpp=mpp,
        )

    def _read(self, split: Split, side_um: float, mpp: float, size_px: int) -> TileSet:
        tiles = self._tiles(split, side_um, mpp)
        pictures = read_squares(self._slides.source, [tile.square for tile in tiles], size_px)
        return TileSet(
            pictures={c: [self.recolor(picture, c) for picture in pictures] for c in COLORS},
            labels=np.array([tile.label for tile in tiles], np.int64),
            groups=groups_of(self._slides, tiles),
        )

    def _check(self) -> None:
        for rule in (self.same_pixels, self.same_field):
            for scale, parts in rule.items():
                for split, part in parts.items():
                    self._require(split, scale, part.labels)

    def _require(self, split: Split, scale: float, labels: NDArray[np.int64]) -> None:
        num_classes = len(np.unique(labels))
        if len(labels) < _MIN_TILES or num_classes < 2:
            raise SourceError(
                f"at {scale:g} um per pixel the {split} slides have {len(labels)} labelled tiles "
                f"of {num_classes} classes; expected at least {_MIN_TILES} of two. Lower --purity "
                "or --tile-px, or take more slides."
            )

    def _cut_squares(self, split: Split) -> list[tuple[int, Footprint]]:
        """Squares of the coarse tiles' side, anywhere that is fine enough."""
        settings = self._settings
        side_um = settings.tile_px * settings.scales[0]
        tiles = labelled_tiles(
            self._slides,
            split,
            side_um,
            purity=1e-6,
            max_per_slide=settings.squares_per_slide,
            finest_mpp=settings.scales[-1],
        )
        return [tile.square for tile in tiles]
