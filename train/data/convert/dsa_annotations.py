"""Reads annotation exports of the Digital Slide Archive.

They follow large_image's annotation schema (girder/large_image, girder_annotation/docs). A file
holds one document or a list of documents: `{"annotation": {"name": ..., "elements": [...]}}`, or
only the value of `annotation`. Elements with an area are drawn: `polyline` with `closed` and
optional `holes`, `rectangle`, `ellipse` and `circle`. Points, arrows, open lines, heatmaps and
overlays are not. Coordinates are (x, y, z) in pixels of the slide at full resolution.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from serve.contract.json_text import parse_json
from train.data.convert.shapes import CIRCLE, UNNAMED, Annotation, Ring, ring_of
from train.data.folder import is_color
from train.errors import AnnotationError


def read_dsa(path: Path, content: Any) -> list[Annotation]:
    """Read an export as the annotations that all formats share.

    The label of an element is its `group`, else its `label.value`, else the document's name.

    Raises:
        AnnotationError: the file is not an annotation export.
    """
    found: list[Annotation] = []
    try:
        for document in content if isinstance(content, list) else [content]:
            annotation = document.get("annotation", document)
            for number, element in enumerate(annotation["elements"], start=1):
                label = element.get("group") or (element.get("label") or {}).get("value")
                rings = _rings(element)
                kind = _kind(element)
                if rings is not None and len(rings[0]) < 3:
                    kind, rings = f"closed polyline with {len(rings[0])} points", None
                found.append(
                    Annotation(
                        label=str(label or annotation.get("name") or UNNAMED),
                        rings=rings or (),
                        kind=kind,
                        place=f"element {number}",
                        color=_color(element.get("lineColor")),
                    )
                )
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise _other(path, error) from error
    return found


def _color(text: Any) -> str | None:
    """Convert "rgb(0, 128, 0)" or "#008000" to #rrggbb; None for anything else."""
    numbers = re.findall(r"\d+", text) if isinstance(text, str) and text.startswith("rgb") else []
    if len(numbers) >= 3:
        return "#{:02x}{:02x}{:02x}".format(*(min(int(n), 255) for n in numbers[:3]))
    return text if is_color(text) else None


def read_export(path: Path) -> list[Annotation]:
    """Read an export's file; see `read_dsa`.

    Raises:
        AnnotationError: the file is not an annotation export.
    """
    try:
        content = parse_json(path.read_bytes())
    except (ValueError, OSError) as error:
        raise _other(path, error) from error
    return read_dsa(path, content)


def _other(path: Path, error: Exception) -> AnnotationError:
    return AnnotationError(
        f"{path} is not an annotation export of the Digital Slide Archive ({error!r}); "
        'expected JSON: {"annotation": {"name": "...", "elements": [{"type": "polyline", '
        '"closed": true, "points": [[x, y, 0], ...], "group": "Gray Matter"}, ...]}}, or a '
        "list of these. Export the annotations again."
    )


def _kind(element: dict[str, Any]) -> str:
    return "open polyline" if element["type"] == "polyline" else str(element["type"])


def _rings(element: dict[str, Any]) -> tuple[Ring, ...] | None:
    """Outline and holes of an element, or None if it has no area."""
    kind = element["type"]
    if kind == "polyline" and element.get("closed"):
        holes = (ring_of(hole) for hole in element.get("holes") or ())
        return (ring_of(element["points"]), *(hole for hole in holes if len(hole) >= 3))
    if kind == "rectangle":
        corners = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
        return (_placed(corners, element, element["width"], element["height"]),)
    if kind == "ellipse":
        return (_placed(CIRCLE / 2, element, element["width"], element["height"]),)
    if kind == "circle":
        return (_placed(CIRCLE, element, element["radius"], element["radius"]),)
    return None


def _placed(unit: Ring, element: dict[str, Any], width: float, height: float) -> Ring:
    """Scale a unit shape around 0, rotate it and move it to the element's centre.

    `rotation` is in radians, from the image's x axis towards its y axis, which points down. The
    archive's own viewer draws it so, although its schema says counterclockwise.
    """
    x, y = element["center"][:2]
    numbers = [float(element.get("rotation") or 0), width, height, x, y]
    if not np.isfinite(np.asarray(numbers, np.float64)).all():
        raise ValueError(f"a {element['type']} has the numbers {numbers}")
    angle = numbers[0]
    cos, sin = math.cos(angle), math.sin(angle)
    turned = unit * [width, height] @ np.array([[cos, sin], [-sin, cos]])
    return ring_of(turned + np.array([x, y], np.float64))
