"""A source of slides with its splits, and the choice of slides that are usable."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.data.convert.images import VALIDATION_FOLD
from train.data.convert.layout import TEST_FOLD
from train.data.folder import Split
from train.data.folds import read_folds
from train.data.images import read_image
from train.errors import DatasetError, ScaleError, SourceError
from train.pretraining.footprints import Footprint
from train.pretraining.regions import MAX_ENLARGEMENT, RegionSource
from train.pretraining.settings import ViewSettings

_SPLIT_OF_FOLD: dict[int, Split] = {TEST_FOLD: "test", VALIDATION_FOLD: "validation"}
"""Every other fold is for training."""
_WINDOW = 1.33


@dataclass(frozen=True)
class SplitSource:
    """A source with the numbers of its slides in each split."""

    source: RegionSource
    slides: dict[Split, tuple[int, ...]]
    name: str


def split_by_fold(folds: Iterable[int]) -> dict[Split, tuple[int, ...]]:
    """Sort the numbers of slides into splits, by the fold of each slide."""
    splits: dict[Split, list[int]] = {"training": [], "validation": [], "test": []}
    for number, fold in enumerate(folds):
        splits[_SPLIT_OF_FOLD.get(fold, "training")].append(number)
    return {split: tuple(numbers) for split, numbers in splits.items()}


class OpenImage:
    """Reads image `i` of a list; picklable, for loader workers."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self._paths = paths

    def __call__(self, index: int) -> NDArray[np.uint8]:
        """Read it as (H, W, 3) uint8 RGB."""
        return read_image(self._paths[index])


def with_folds(found: SplitSource, path: Path) -> SplitSource:
    """The same slides with the folds of another file, such as a prepared data set's folds.csv.

    Args:
        found: the source.
        path: columns img_id, a slide's name with or without its suffix, and fold.

    Raises:
        DatasetError: the file cannot be used, or leaves a slide out.
    """
    given = {row.tile_id: row.fold for row in read_folds(path)}
    names = [info.name for info in found.source.slides]
    folds = [given.get(name, given.get(Path(name).stem)) for name in names]
    missing = [name for name, fold in zip(names, folds, strict=True) if fold is None]
    if missing:
        raise DatasetError(
            f"{path} has no line for {len(missing)} of the {len(names)} slides of "
            f"{found.name}, such as {missing[0]}; expected all, since a slide for testing must not "
            "be learned from. Give the folds.csv that was made of these slides."
        )
    return replace(found, slides=split_by_fold(fold for fold in folds if fold is not None))


_MIN_TISSUE = 0.001
"""Least share of tissue in some square of some slide; less is glass (our choice)."""


def usable_slides(
    found: SplitSource, slides: tuple[int, ...], views: ViewSettings
) -> tuple[int, ...]:
    """Choose the slides that are large and fine enough for the views.

    Raises:
        SourceError: none is large enough, or none shows tissue.
        ScaleError: none is as fine as the finest scale.
    """
    infos = {slide: found.source.slides[slide] for slide in slides}
    needed_um = _WINDOW * views.coarse_mpp * views.view_px
    large = [s for s, info in infos.items() if min(info.width_um, info.height_um) >= needed_um]
    if not large:
        largest = max((min(i.width_um, i.height_um) for i in infos.values()), default=0.0)
        raise SourceError(
            f"{found.name} has no slide of {needed_um:.0f} um for views of {views.view_px} pixels "
            f"at {views.coarse_mpp:g} um per pixel (the largest has {largest:.0f} um). Take "
            "smaller views (--view-px), a finer --coarse-mpp, or larger images."
        )
    limit = min(views.mpps) * MAX_ENLARGEMENT
    usable = tuple(slide for slide in large if infos[slide].base_mpp <= limit)
    if not usable:
        finest = min(infos[slide].base_mpp for slide in large)
        raise ScaleError(
            f"{found.name} is {finest:g} um per pixel at its finest, and views at "
            f"{min(views.mpps):g} are asked for; detail that was not scanned cannot be learned. "
            "Take coarser --fine-mpps or finer slides."
        )
    if not any(_shows_tissue(found.source, slide) for slide in usable):
        raise SourceError(
            f"none of the {len(usable)} slides of {found.name} shows tissue: all are as pale as "
            "glass. Expected stained sections; check that the images are those meant."
        )
    if len(usable) < len(slides):
        print(
            f"{len(slides) - len(usable)} of {len(slides)} training slides are left out: smaller "
            f"than {needed_um:.0f} um, or coarser than {limit:.3g} um per pixel",
            file=sys.stderr,
        )
    return usable


def _shows_tissue(source: RegionSource, slide: int) -> bool:
    info = source.slides[slide]
    side = min(info.height_um, info.width_um)
    length = max(info.height_um, info.width_um)
    for start in np.linspace(0, length - side, int(np.ceil(length / side))):
        top, left = (start, 0.0) if info.height_um > info.width_um else (0.0, start)
        if source.tissue_share(slide, Footprint(float(top), float(left), side)) >= _MIN_TISSUE:
            return True
    return False
