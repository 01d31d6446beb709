"""ASAP's annotations: XML with Annotation elements; CAMELYON's are of this kind.

A label is the annotation's group (PartOfGroup); without one it is unclassified. A Spline is
refused: the file has its control points only, not the curve that was seen.
"""

from pathlib import Path
from xml.etree.ElementTree import Element

from train.data.convert.shapes import UNNAMED, Annotation, Ring, ring_of
from train.errors import AnnotationError

_AREAS = ("Polygon", "Rectangle")


def read_asap(path: Path, root: Element) -> list[Annotation]:
    """Read what ASAP saves.

    Raises:
        AnnotationError: a coordinate is missing or not a number.
    """
    found = []
    for number, element in enumerate(root.iter("Annotation"), start=1):
        kind = element.get("Type", "annotation without a type")
        name = element.get("Name") or f"annotation {number}"
        group = element.get("PartOfGroup") or "None"
        try:
            ring = _ring(element)
        except (KeyError, TypeError, ValueError) as error:
            raise AnnotationError(
                f"{path}, {name}: {error!r}; expected Coordinate elements with Order, X and Y. "
                "Save the annotations again in ASAP."
            ) from error
        is_area = kind in _AREAS and len(ring) >= 3
        found.append(
            Annotation(
                label=UNNAMED if group == "None" else group,
                rings=(ring,) if is_area else (),
                kind=kind,
                place=name,
                color=element.get("Color"),
            )
        )
    return found


def _ring(element: Element) -> Ring:
    points = [
        (int(point.get("Order", "0")), float(point.attrib["X"]), float(point.attrib["Y"]))
        for point in element.iter("Coordinate")
    ]
    points.sort(key=lambda point: point[0])  # those without an order, or of one, as they stand
    return ring_of([xy for _, *xy in points])
