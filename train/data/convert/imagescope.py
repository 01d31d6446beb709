"""Aperio ImageScope's annotations: XML with layers (Annotation) of regions.

A label is the layer's name, else the name of its first attribute, else "layer 1" and so on. A
region marked as negative (NegativeROA) is a hole of the region that it names (InputRegionId), else
of all regions of its layer that it reaches into.
"""

from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from train.data.convert.shapes import CIRCLE, Annotation, Ring, do_overlap, ring_of
from train.errors import AnnotationError

_KINDS = {"0": "freehand", "1": "rectangle", "2": "ellipse", "3": "arrow", "4": "ruler"}
_AREAS = ("freehand", "rectangle", "ellipse")


def read_imagescope(path: Path, root: Element) -> list[Annotation]:
    """Read what ImageScope saves.

    Raises:
        AnnotationError: a vertex is missing or not a number.
    """
    found: list[Annotation] = []
    for layer in root.iter("Annotation"):
        try:
            found += _regions(layer)
        except (KeyError, TypeError, ValueError) as error:
            raise AnnotationError(
                f"{path}, layer {layer.get('Id')}: {error!r}; expected Region elements with "
                "Vertex elements that have X and Y. Save the annotations again in ImageScope."
            ) from error
    return found


def _regions(layer: Element) -> list[Annotation]:
    attribute = next((a.get("Name") for a in layer.iter("Attribute") if a.get("Name")), None)
    label = layer.get("Name") or attribute or f"layer {layer.get('Id')}"
    areas: list[tuple[Ring, ...]] = []
    kinds: list[str] = []
    numbers: list[str] = []  # not unique in files that were put together
    holes: list[tuple[str, Ring]] = []
    for position, region in enumerate(layer.iter("Region"), start=1):
        kind = _KINDS.get(region.get("Type", "0"), f"type {region.get('Type')}")
        ring = _ring(region, kind)
        if region.get("NegativeROA") == "1":
            if len(ring) >= 3:
                holes.append((region.get("InputRegionId", ""), ring))
            continue
        numbers.append(region.get("Id") or str(position))
        kinds.append(kind)
        areas.append((ring,) if kind in _AREAS and len(ring) >= 3 else ())
    for parent, hole in holes:
        named = [index for index, number in enumerate(numbers) if number == parent and areas[index]]
        for index in named or range(len(areas)):
            if areas[index] and do_overlap(areas[index][0], hole):
                areas[index] += (hole,)
    return [
        Annotation(
            label=label,
            rings=rings,
            kind=kind,
            place=f"region {number} of layer {layer.get('Id')}",
            color=_color(layer.get("LineColor")),
        )
        for number, kind, rings in zip(numbers, kinds, areas, strict=True)
    ]


def _ring(region: Element, kind: str) -> Ring:
    vertices = region.iter("Vertex")
    ring = ring_of([(float(v.attrib["X"]), float(v.attrib["Y"])) for v in vertices])
    if kind == "rectangle" and len(ring) == 2:  # opposite corners
        (left, top), (right, bottom) = ring
        return np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
    if kind == "ellipse" and len(ring):  # its box's corners
        low, high = ring.min(axis=0), ring.max(axis=0)
        return np.asarray((low + high) / 2 + CIRCLE * (high - low) / 2)
    return ring


def _color(text: str | None) -> str | None:
    """#rrggbb of a number whose lowest byte is red."""
    if text is None or not text.isdigit():
        return None
    value = int(text)
    return f"#{value & 255:02x}{value >> 8 & 255:02x}{value >> 16 & 255:02x}"
