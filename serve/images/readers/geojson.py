"""Where the coordinates of GeoJSON begin: not every program counts from a slide's own corner."""

import math
from collections.abc import Iterator
from typing import Any

STATED = "origin_px"
"""Key of FocalPath's header: x and y of level 0 at which its coordinates are 0."""
_QUPATH_PROPERTIES = {"objectType", "object_type", "isLocked"}
_QUPATH_ID = "PathAnnotationObject"


def is_focalpath(document: Any) -> bool:
    """Whether FocalPath wrote a GeoJSON document of a whole slide."""
    return isinstance(document, dict) and isinstance(document.get("focalpath"), dict)


def stated_origin(document: Any) -> tuple[float, float]:
    """X and y of level 0 at which the coordinates of FocalPath's GeoJSON are 0.

    Raises:
        ValueError: the document states something else.
    """
    stated = document["focalpath"].get(STATED, [0.0, 0.0])
    if not (isinstance(stated, list) and all(type(one) in (int, float) for one in stated)):
        raise ValueError(f"{stated!r}, expected two numbers")  # a text of two figures is none
    try:
        x, y = map(float, stated)
    except OverflowError as error:
        raise ValueError(error) from error
    if not math.isfinite(x + y):
        raise ValueError(f"{x}, {y}")
    return x, y


def begins_at_bounds(document: Any) -> bool:
    """Whether coordinates begin where the scanned part of a slide does.

    QuPath crops slides to that part, and counts from there. It marks its objects: `objectType`
    since 0.4, `object_type` or `isLocked` before, and an `id` of its own in 0.2.
    """
    return not is_focalpath(document) and any(map(_is_qupaths, _features(document)))


def _features(document: Any) -> Iterator[dict[str, Any]]:
    some = document.get("features", [document]) if isinstance(document, dict) else document
    return (one for one in (some if isinstance(some, list) else []) if isinstance(one, dict))


def _is_qupaths(feature: dict[str, Any]) -> bool:
    properties = feature.get("properties")
    is_marked = isinstance(properties, dict) and not _QUPATH_PROPERTIES.isdisjoint(properties)
    return is_marked or feature.get("id") == _QUPATH_ID
