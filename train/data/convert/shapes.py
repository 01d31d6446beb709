"""Annotated areas of any format, and how they become labels of pixels."""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ring = NDArray[np.float64]
"""(N, 2) x and y of a closed line in pixels; the last point is joined to the first."""
UNNAMED = "unclassified"
"""The label of annotations that have none."""

_FARTHEST = 1e9
"""In pixels; what is beyond it is a mistake, and overflows."""

_ANGLES = np.linspace(0, 2 * math.pi, 128, endpoint=False)
CIRCLE: Ring = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
"""Of radius 1, around 0."""


def plain_label(label: str) -> str:
    """One spelling of labels that look the same: letters in one part, single spaces between."""
    return " ".join(unicodedata.normalize("NFC", label).split()) or UNNAMED


def ring_of(points: Sequence[Any]) -> Ring:
    """The x and y of points, which may have more coordinates.

    Raises:
        ValueError: one is not a number, or is no place on any slide.
    """
    ring = np.array([point[:2] for point in points], dtype=np.float64).reshape(len(points), 2)
    if not (np.abs(ring) < _FARTHEST).all():
        raise ValueError(f"an outline has the points {str(points)[:80]}")
    return ring


def area_of(ring: Ring) -> float:
    """Area inside a ring in square pixels, by the shoelace formula."""
    x, y = ring.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def do_overlap(one: Ring, other: Ring) -> bool:
    """Whether the boxes around two rings overlap."""
    apart = (one.max(axis=0) <= other.min(axis=0)) | (other.max(axis=0) <= one.min(axis=0))
    return not apart.any()


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

    def moved(self, x: float, y: float) -> "Annotation":
        """The same annotation, x to the right and y down."""
        return replace(self, rings=tuple(ring + [x, y] for ring in self.rings))


def fill_shape(labels: NDArray[np.uint8], rings: tuple[Ring, ...], value: int) -> bool:
    """Set the pixels whose centre is inside the outline and in no hole, in place.

    Holes may reach beyond the outline or overlap each other, as those drawn by hand do. Pillow's
    polygons also cover their outline, a pixel more on two sides, which would shift every border
    between classes and shrink holes; so rows are filled here between crossings.

    Args:
        labels: (H, W) uint8; pixel (row, column) has its centre at (column + 0.5, row + 0.5).
        rings: outline and holes in pixels of `labels`; may reach beyond it.
        value: the label.

    Returns:
        Whether any pixel was reached.
    """
    place, inside = _covered(labels.shape, rings)
    labels[place][inside] = value
    return bool(inside.any())


def _covered(
    shape: tuple[int, ...], rings: tuple[Ring, ...]
) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
    """The rows and columns that an area reaches, and which of their pixels it covers."""
    height, width = shape
    top, bottom, left, right = box = _box(rings[0], (0, height, 0, width))
    inside = _inside(rings[0], box)
    for hole in rings[1:]:
        within = _box(hole, box)
        part = inside[within[0] - top : within[1] - top, within[2] - left : within[3] - left]
        part &= ~_inside(hole, within)
    return (slice(top, bottom), slice(left, right)), inside


def _box(ring: Ring, limits: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of the pixels that a ring reaches within others."""
    top, bottom, left, right = limits
    low, high = np.floor(ring.min(axis=0)), np.ceil(ring.max(axis=0))
    columns, rows = (
        np.clip([low[axis], high[axis]], *between).astype(int).tolist()
        for axis, between in enumerate(((left, right), (top, bottom)))
    )
    return rows[0], rows[1], columns[0], columns[1]


def _inside(ring: Ring, box: tuple[int, int, int, int]) -> NDArray[np.bool_]:
    """The pixels of a box whose centre an odd number of turns of the ring surrounds."""
    top, bottom, left, right = box
    # A crossing toggles all pixels to its right, so inside is where the toggles so far are odd.
    toggles = np.zeros((bottom - top, right - left + 1), np.uint8)
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        first = max(top, math.ceil(min(y0, y1) - 0.5))
        last = min(bottom, math.ceil(max(y0, y1) - 0.5))
        if first >= last:
            continue
        rows = np.arange(first, last)
        crossings = x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
        columns = np.clip(np.ceil(crossings - 0.5), left, right).astype(np.int64)
        toggles[rows - top, columns - left] ^= 1
    return np.bitwise_xor.accumulate(toggles[:, :-1], axis=1).astype(bool)


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
        place, inside = _covered(labels.shape, rings)
        if inside.any() and not (labels[place][inside] == value).any():
            gone.append(name)
    return gone
