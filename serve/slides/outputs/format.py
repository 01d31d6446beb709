"""What a slide's output format is, and what it is written from."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import zarr
from numpy.typing import NDArray

from serve.images.readers.reader import RegionReader
from serve.slides.options import OutputOptions
from serve.slides.plan import Plan, Rectangle
from serve.slides.store import CONFIDENCE, LABELS, array_of
from serve.slides.summary import SlideSummary

T = TypeVar("T")


@dataclass(frozen=True)
class SlideResult:
    """The label and confidence maps of a slide, all blocks done."""

    name: str
    store: Path
    """The OME-Zarr group."""
    plan: Plan
    summary: SlideSummary
    reader: RegionReader
    options: OutputOptions
    _computed: dict[Callable[..., Any], Any] = field(default_factory=dict, repr=False)

    def once(self, compute: "Callable[[SlideResult], T]") -> T:
        """What a function makes of this result, computed once for all outputs."""
        if compute not in self._computed:
            self._computed[compute] = compute(self)
        found: T = self._computed[compute]
        return found

    @cached_property
    def _group(self) -> zarr.Group:
        return zarr.open_group(self.store, mode="r")

    def labels(self, level: int = 0) -> "zarr.Array[Any]":
        """(h, w) uint8, 0 outside of the tissue, 1..C; of a level of the pyramid."""
        return array_of(self._group, f"{LABELS[:-1]}{level}")

    def cut(self, cells: Rectangle) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Labels and confidence of a rectangle of cells, (h, w) uint8.

        The confidence is 255 = 1.0, and 0 outside of the tissue.
        """
        place, confidence = cells.slices, array_of(self._group, CONFIDENCE)
        return np.asarray(self.labels()[place]), np.asarray(confidence[place])

    @property
    def colors(self) -> NDArray[np.uint8]:
        """(256, 3) uint8, the RGB of each label; black where it has no class."""
        colors = np.zeros((256, 3), np.uint8)
        colors[1 : len(self.plan.model.classes) + 1] = [c.rgb for c in self.plan.model.classes]
        return colors

    @property
    def num_levels(self) -> int:
        """Levels of the pyramid."""
        return num_levels(self.plan.shape)

    def blocks(self) -> list[Rectangle]:
        """The rectangles of all blocks, row by row."""
        return [self.plan.rectangle(block) for block in self.plan.all_blocks()]

    def to_level0(self, cells: NDArray[np.float64]) -> NDArray[np.float64]:
        """Places in cells, (N, 2) x and y, as pixels of the slide's level 0."""
        step = np.array(self.plan.level0_px_per_cell[::-1])
        places: NDArray[np.float64] = cells * step + np.array(self.plan.origin_px[::-1])
        return places


@dataclass(frozen=True, kw_only=True)
class SlideFormat:
    """One way to hand out a slide's result."""

    name: str
    """For `--format`."""
    title: str
    """For a page's link."""
    description: str
    file: str
    """Name of the file or folder; `{name}` is the slide's."""
    media_type: str
    write: Callable[[SlideResult, Path], None]
    """Writes the file or folder that it is given."""
    is_outlines: bool = False
    """It is written from the outlines, and others from the maps of labels and confidence."""

    def path(self, folder: Path, name: str) -> Path:
        """Where the output is."""
        return folder / self.file.format(name=name)


LEAST_SIDE = 256
"""The pyramid ends with the level that is no larger than this."""


def num_levels(shape: tuple[int, int]) -> int:
    """Levels of a pyramid that halves both sides."""
    levels, side = 1, max(shape)
    while side > LEAST_SIDE:
        side = -(-side // 2)
        levels += 1
    return levels
