"""Labelled tiles of the same slides at several scales."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.data.folder import Split, Tile, read_tile_folder
from train.data.masks import read_mask
from train.data.pixels import read_labels
from train.errors import SourceError
from train.pretraining.footprints import Footprint
from train.pretraining.ocelot_pairs import OcelotRegions
from train.pretraining.regions import RegionSource, SlideInfo
from train.pretraining.sources import open_source
from train.pretraining.split_source import SplitSource
from train.settings import LabelClass

_OCELOT_CLASSES = (
    LabelClass(name="Background", color="#56b4e9"),
    LabelClass(name="Cancer area", color="#d55e00"),
)
_OCELOT_CODES = (1, 2)
"""Published codes of the tissue masks, which are the labels. 255 is unknown."""


ReadLabels = Callable[[int], tuple[NDArray[np.uint8], float]]
"""Of a slide: labels (H, W) uint8, 0 unlabelled, 1..C, and their um per pixel."""
_KEPT_MASKS = 8
"""Masks kept decoded: the squares of one slide are looked up one after the other."""


@dataclass(frozen=True)
class LabelledSlides:
    """Slides whose splits and labels are known."""

    found: SplitSource
    classes: tuple[LabelClass, ...]
    """Of labels 1..C."""
    read_labels: ReadLabels

    @property
    def source(self) -> RegionSource:
        """Where pixels are read."""
        return self.found.source

    def info(self, slide: int) -> SlideInfo:
        """One slide."""
        return self.source.slides[slide]


def open_labelled(root: Path) -> LabelledSlides:
    """Open slides with their masks.

    Raises:
        SourceError: the folder is of no known kind, or has no masks.
    """
    found = open_source(root)
    if (root / "dataset.json").is_file():
        folder = read_tile_folder(root)
        tiles = [tile for tiles in folder.tiles.values() for tile in tiles]
        return LabelledSlides(found, folder.classes, _folder_labels(tiles, len(folder.classes)))
    if isinstance(found.source, OcelotRegions):
        return LabelledSlides(found, _OCELOT_CLASSES, _ocelot_labels(root, found.source))
    raise SourceError(
        f"{root} has no masks; expected a data set's mask/ or OCELOT's annotations/. Encoders are "
        "compared on labelled tiles."
    )


def _folder_labels(tiles: Sequence[Tile], num_classes: int) -> ReadLabels:
    @lru_cache(_KEPT_MASKS)
    def read(slide: int) -> tuple[NDArray[np.uint8], float]:
        tile = tiles[slide]
        assert tile.mpp is not None, "checked when the folder was opened"
        return read_labels(tile, num_classes), tile.mpp

    return read


def _ocelot_labels(root: Path, source: RegionSource) -> ReadLabels:
    @lru_cache(_KEPT_MASKS)
    def read(slide: int) -> tuple[NDArray[np.uint8], float]:
        info = source.slides[slide]
        codes = read_mask(root / "annotations" / "train" / "tissue" / f"{info.name}.png", 255)
        labels = np.where(np.isin(codes, _OCELOT_CODES), codes, 0).astype(np.uint8)
        return labels, info.outer_mpp or info.base_mpp

    return read


@dataclass(frozen=True)
class LabelledTile:
    """A square of a slide with the class of most of its labelled pixels."""

    slide: int
    footprint: Footprint
    label: int
    """1..C."""

    @property
    def square(self) -> tuple[int, Footprint]:
        """Where it lies."""
        return self.slide, self.footprint


def labelled_tiles(
    slides: LabelledSlides,
    split: Split,
    side_um: float,
    *,
    purity: float,
    max_per_slide: int,
    finest_mpp: float,
) -> list[LabelledTile]:
    """Non-overlapping squares whose largest class has at least `purity` of the labelled pixels.

    Args:
        slides: what to cut.
        split: which slides.
        side_um: side of a square.
        purity: least share of the largest class, and of labelled pixels.
        max_per_slide: at most this many per slide, evenly from all over it.
        finest_mpp: um per pixel that the squares will be read at; where a slide is coarser, it
            has none.
    """
    tiles: list[LabelledTile] = []
    for slide in slides.found.slides[split]:
        labels, mpp = slides.read_labels(slide)
        kept = []
        for square in _grid(slides.info(slide), side_um, finest_mpp):
            label = _label(labels, mpp, square, purity, len(slides.classes))
            if label:
                kept.append(LabelledTile(slide, square, label))
        chosen = np.linspace(0, len(kept) - 1, min(len(kept), max_per_slide)).round().astype(int)
        tiles += [kept[index] for index in chosen]
    return tiles


def _grid(info: SlideInfo, side_um: float, finest_mpp: float) -> list[Footprint]:
    """Squares side by side over the part of a slide that is fine enough."""
    area = Footprint(0.0, 0.0, min(info.height_um, info.width_um))
    height, width = info.height_um, info.width_um
    if info.fine_area is not None and finest_mpp < (info.outer_mpp or 0.0) * 0.98:
        area = info.fine_area
        height = width = area.side_um
    rows, columns = int(height // side_um + 1e-6), int(width // side_um + 1e-6)
    top = area.y_um + (height - rows * side_um) / 2
    left = area.x_um + (width - columns * side_um) / 2
    return [
        Footprint(top + row * side_um, left + column * side_um, side_um)
        for row in range(rows)
        for column in range(columns)
    ]


def _label(
    labels: NDArray[np.uint8], mpp: float, square: Footprint, purity: float, num_classes: int
) -> int:
    top, left = round(square.y_um / mpp), round(square.x_um / mpp)
    side = max(1, round(square.side_um / mpp))
    counts = np.bincount(
        labels[top : top + side, left : left + side].ravel(), minlength=num_classes + 1
    )
    num_labelled = int(counts[1:].sum())
    largest = int(counts[1:].argmax()) + 1
    enough = num_labelled >= purity * max(1, counts.sum())
    return largest if enough and counts[largest] >= purity * max(1, num_labelled) else 0


def groups_of(slides: LabelledSlides, tiles: Sequence[LabelledTile]) -> NDArray[np.str_]:
    """The patient or case of each tile."""
    return np.array([slides.info(tile.slide).group for tile in tiles])
