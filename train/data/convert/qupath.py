"""QuPath's annotations: GeoJSON, a FeatureCollection, a list of features, or one.

A label is the name in `properties.classification`, or its several `names` joined as QuPath shows
them, else `properties.name`. Objects inside others (`childObjects`) follow these. Coordinates are
pixels of the image as QuPath shows it: a slide with an empty outside is cropped to its bounds.
"""

from pathlib import Path
from typing import Any

from train.data.convert.shapes import UNNAMED, Annotation, Ring, ring_of
from train.errors import AnnotationError

_AREAS = ("Polygon", "MultiPolygon")


def read_qupath(path: Path, content: Any) -> list[Annotation]:
    """Read what QuPath exports.

    Raises:
        AnnotationError: it is not such GeoJSON.
    """
    try:
        features = content if isinstance(content, list) else content.get("features", [content])
        return [
            annotation
            for number, feature in enumerate(features, start=1)
            for annotation in _annotations(feature, f"feature {number}")
        ]
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise AnnotationError(
            f"{path} is not QuPath's GeoJSON ({error!r}); expected features with a geometry and "
            "properties. Export it again: File, Export objects as GeoJSON."
        ) from error


def _annotations(feature: dict[str, Any], place: str) -> list[Annotation]:
    properties = feature.get("properties") or {}
    classification = properties.get("classification") or {}
    if isinstance(classification, str):  # as other programs write it
        classification = {"name": classification}
    name = ": ".join(classification.get("names") or ()) or classification.get("name")
    geometry = feature["geometry"] or {"type": "object without a geometry"}
    kind = geometry["type"]
    areas: list[tuple[Ring, ...]] = [()]
    if kind in _AREAS:
        polygons = geometry["coordinates"]
        polygons = [polygons] if kind == "Polygon" else polygons
        areas = [tuple(_ring(ring) for ring in rings) for rings in polygons]
    found = [
        Annotation(
            label=str(name or properties.get("name") or UNNAMED),
            rings=rings,
            kind=kind,
            place=place,
            color=_color(classification) or _color(properties),
        )
        for rings in areas
    ]
    for number, child in enumerate(properties.get("childObjects") or (), start=1):
        found += _annotations(child, f"{place}.{number}")
    return found


def _ring(points: list[Any]) -> Ring:
    if len(points) < 3:
        raise ValueError(f"a polygon has the points {str(points)[:80]}")
    return ring_of(points)


def _color(properties: dict[str, Any]) -> str | None:
    """#rrggbb of [r, g, b], or of the signed number that QuPath 0.2 and earlier wrote."""
    if isinstance(properties.get("colorRGB"), int):
        return f"#{properties['colorRGB'] & 0xFFFFFF:06x}"
    rgb = properties.get("color")
    if isinstance(rgb, list) and len(rgb) >= 3:
        return "#{:02x}{:02x}{:02x}".format(*(int(value) & 255 for value in rgb[:3]))
    return None
