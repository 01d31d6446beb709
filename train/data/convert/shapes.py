"""Annotated areas of any format, and how they become labels of pixels."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ring = NDArray[np.float64]
"""(N, 2) x and y of a closed line in pixels; the last point is joined to the first."""
UNNAMED = "unclassified"
"""The label of annotations that have none."""


def area_of(ring: Ring) -> float:
    """Area inside a ring in square pixels, by the shoelace formula."""
    x, y = ring.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


@dataclass(frozen=True, eq=False)
class Shape:
    """An area with its label: an outline, then its holes."""

    label: str
    rings: tuple[Ring, ...]

    @property
    def area_px(self) -> float:
        """Area inside the outline, holes included."""
        return area_of(self.rings[0])

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the outline."""
        (left, top), (right, bottom) = self.rings[0].min(axis=0), self.rings[0].max(axis=0)
        return float(left), float(top), float(right), float(bottom)


@dataclass(frozen=True, eq=False, kw_only=True)
class Annotation:
    """One annotation of a file, in pixels of the slide at its full resolution."""

    label: str
    """Its class as the file names it, or `UNNAMED`."""
    rings: tuple[Ring, ...]
    """Outline and holes; empty where it has no area."""
    kind: str
    """What it is in the words of its format, such as point."""
    place: str
    """Which it is in its file, such as element 3."""
    color: str | None = None
    """#rrggbb, where the file says it."""


def fill_shape(labels: NDArray[np.uint8], rings: tuple[Ring, ...], value: int) -> bool:
    """Set the pixels whose centre is inside an odd number of rings, in place.

    Pillow's polygons also cover their outline, a pixel more on two sides, which would shift every
    border between classes and shrink holes; so rows are filled here between crossings.

    Args:
        labels: (H, W) uint8; pixel (row, column) has its centre at (column + 0.5, row + 0.5).
        rings: outline and holes in pixels of `labels`; may reach beyond it.
        value: the label.

    Returns:
        Whether any pixel was reached.
    """
    height, width = labels.shape
    low, high = rings[0].min(axis=0), rings[0].max(axis=0)
    left, right = (int(np.clip(edge, 0, width)) for edge in (low[0], math.ceil(high[0])))
    top, bottom = (int(np.clip(edge, 0, height)) for edge in (low[1], math.ceil(high[1])))
    if left >= right or top >= bottom:
        return False
    # A crossing toggles all pixels to its right, so inside is where the toggles so far are odd.
    toggles = np.zeros((bottom - top, right - left + 1), np.uint8)
    for ring in rings:
        for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            first = max(top, math.ceil(min(y0, y1) - 0.5))
            last = min(bottom, math.ceil(max(y0, y1) - 0.5))
            if first >= last:
                continue
            rows = np.arange(first, last)
            crossings = x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
            columns = np.clip(np.ceil(crossings - 0.5), left, right).astype(np.int64)
            toggles[rows - top, columns - left] ^= 1
    inside = np.bitwise_xor.accumulate(toggles[:, :-1], axis=1).astype(bool)
    labels[top:bottom, left:right][inside] = value
    return bool(inside.any())


def vanished(
    shapes: list[tuple[str, int, tuple[Ring, ...]]], labels: NDArray[np.uint8]
) -> list[str]:
    """The names of areas of which nothing is left in (H, W) labels, as others cover them.

    Args:
        shapes: Name, label and rings, in pixels of `labels`.
        labels: What came of drawing them all.
    """
    gone = []
    for name, value, rings in shapes:
        own = np.zeros(labels.shape, np.uint8)
        if fill_shape(own, rings, 1) and not (labels[own == 1] == value).any():
            gone.append(name)
    return gone
