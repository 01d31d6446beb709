"""Annotation exports of the Digital Slide Archive, drawn as label maps.

The form is large_image's annotation schema (girder/large_image, girder_annotation/docs): a
document or a list of them, each `{"annotation": {"name": ..., "elements": [...]}}`, or what is
under `annotation` alone. Elements that have an area are drawn: `polyline` with `closed` and perhaps
`holes`, `rectangle`, `ellipse` and `circle`; points, arrows, open lines, heatmaps and overlays are
not. Coordinates are (x, y, z) in pixels of the slide at its full resolution.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.errors import FocalPathError

Ring = NDArray[np.float64]
"""(N, 2) x and y of a closed line in pixels; the last point is joined to the first."""

_ELLIPSE_POINTS = 128


@dataclass(frozen=True, eq=False)
class Shape:
    """An area with its label: an outline, then its holes."""

    label: str
    rings: tuple[Ring, ...]

    @property
    def area_px(self) -> float:
        """Area inside the outline, holes included."""
        x, y = self.rings[0].T
        return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def read_annotations(path: Path) -> tuple[list[Shape], Counter[str]]:
    """Read an export.

    An element's label is its `group`, else its `label.value`, else its document's name.

    Returns:
        The shapes in the file's order, and how many elements of each other kind there are.

    Raises:
        FocalPathError: the file is not such an export.
    """
    shapes: list[Shape] = []
    others: Counter[str] = Counter()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for document in content if isinstance(content, list) else [content]:
            annotation = document.get("annotation", document)
            for number, element in enumerate(annotation["elements"], start=1):
                label = element.get("group") or (element.get("label") or {}).get("value")
                label = str(label or annotation.get("name") or "")
                rings = _rings(element)
                if rings is None:
                    others[_kind(element)] += 1
                elif len(rings[0]) < 3:
                    place = f"{label!r}, element {number} of {path.name}"
                    others[f"closed polyline with {len(rings[0])} points, {place}"] += 1
                else:
                    shapes.append(Shape(label, rings))
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise FocalPathError(
            f"{path} is not an annotation export of the Digital Slide Archive ({error!r}); "
            'expected JSON: {"annotation": {"name": "...", "elements": [{"type": "polyline", '
            '"closed": true, "points": [[x, y, 0], ...], "group": "Gray Matter"}, ...]}}, or a '
            "list of those. Export the annotations again."
        ) from error
    return shapes, others


def _kind(element: dict[str, Any]) -> str:
    return "open polyline" if element["type"] == "polyline" else str(element["type"])


def _rings(element: dict[str, Any]) -> tuple[Ring, ...] | None:
    """Outline and holes of an element, or None where it has no area."""
    kind = element["type"]
    if kind == "polyline" and element.get("closed"):
        holes = (_ring(hole) for hole in element.get("holes") or ())
        return (_ring(element["points"]), *(hole for hole in holes if len(hole) >= 3))
    if kind == "rectangle":
        corners = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
        return (_placed(corners, element, element["width"], element["height"]),)
    if kind in ("ellipse", "circle"):
        angles = np.linspace(0, 2 * math.pi, _ELLIPSE_POINTS, endpoint=False)
        circle = np.stack([np.cos(angles), np.sin(angles)], axis=1) / 2
        width = element["width"] if kind == "ellipse" else 2 * element["radius"]
        height = element["height"] if kind == "ellipse" else 2 * element["radius"]
        return (_placed(circle, element, width, height),)
    return None


def _ring(points: Any) -> Ring:
    ring = np.array([point[:2] for point in points], dtype=np.float64).reshape(len(points), 2)
    if not np.isfinite(ring).all():
        raise ValueError(f"a closed polyline has the points {str(points)[:80]}")
    return ring


def _placed(unit: Ring, element: dict[str, Any], width: float, height: float) -> Ring:
    """Scale a shape of size 1 around 0, turn it and move it to the element's centre.

    `rotation` is in radians, from x towards y of the image, whose y goes down: so the archive's own
    viewer makes it, although its schema says counterclockwise.
    """
    angle = float(element.get("rotation") or 0)
    cos, sin = math.cos(angle), math.sin(angle)
    turned = unit * [width, height] @ np.array([[cos, sin], [-sin, cos]])
    return np.asarray(turned + np.asarray(element["center"][:2], dtype=np.float64))


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
