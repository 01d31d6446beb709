"""Regions as annotations that other programs open: QuPath and the Digital Slide Archive.

The answers of images and the files of whole slides are both written here, block by block: only one
block and the outlines of some regions are held. One region is a line.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import orjson
import shapely
from numpy.typing import NDArray
from pydantic import BaseModel

from serve.answers.polygons import Regions
from serve.contract.manifest import TissueClass
from serve.inference.summary import ModelName

BLOCK_BYTES = 2**16
"""Least bytes of a block of a document, but for its last one."""
_FILL_OPACITY = 0.25
_LINE_WIDTH_PX = 2
_REGIONS_AT_ONCE = 1000
"""Regions whose coordinates are taken out of their polygons at once."""
_Ring = NDArray[np.float64]
"""(N, 2) x and y; the last place is the first one."""


@dataclass(frozen=True)
class Legend:
    """What regions are described with."""

    classes: Sequence[TissueClass]
    um2_per_px: float | None
    """Of the pixels, or cells, that the regions' areas count; None where it is not known."""
    px2_per_px: float = 1.0
    """The same in pixels of the image or slide."""


class _Outline(NamedTuple):
    """One region."""

    rings: list[_Ring]
    """The outer one first."""
    name: str
    color: list[int]
    measurements: dict[str, float]


def geojson(
    parts: Iterable[Regions], legend: Legend, head: Mapping[str, object] | None = None
) -> Iterator[bytes]:
    """A GeoJSON FeatureCollection as QuPath 0.4 and later import it.

    Each feature is an annotation with a class, its colour and measurements. QuPath averages
    nothing over annotations, so each has its own area and mean confidence.

    Args:
        parts: the regions, in the frame of the document.
        legend: describes them.
        head: further members of the collection.
    """
    features = map(_feature, _outlines(parts, legend))
    return _written({"type": "FeatureCollection", **(head or {})}, "features", features)


def dsa_annotation(
    parts: Iterable[Regions], legend: Legend, model: ModelName, attributes: Mapping[str, object]
) -> Iterator[bytes]:
    """An annotation document after large_image's schema: closed polylines with holes."""
    head = {
        "name": f"{model.name} {model.version}",
        "description": "Regions found by FocalPath. For research use only.",
        "attributes": attributes,
    }
    return _written(head, "elements", map(_polyline, _outlines(parts, legend)))


def _outlines(parts: Iterable[Regions], legend: Legend) -> Iterator[_Outline]:
    names = [entry.name for entry in legend.classes]
    colors = [list(entry.rgb) for entry in legend.classes]
    for part in parts:
        for begin in range(0, len(part.labels), _REGIONS_AT_ONCE):
            some = part.selected(slice(begin, begin + _REGIONS_AT_ONCE))
            for rings, label, area, confidence in zip(
                _rings(some.polygons), some.labels, some.area_px, some.mean_confidence, strict=True
            ):
                measurements = {"Area px^2": round(float(area) * legend.px2_per_px, 1)}
                if legend.um2_per_px is not None:
                    measurements["Area um^2"] = round(float(area) * legend.um2_per_px, 3)
                measurements["Mean confidence"] = round(float(confidence), 4)
                yield _Outline(rings, names[label - 1], colors[label - 1], measurements)


def _rings(polygons: NDArray[np.object_]) -> Iterator[list[_Ring]]:
    """The rings of each polygon."""
    rings, of = shapely.get_rings(polygons, return_index=True)
    places = shapely.get_coordinates(rings)
    ends = np.cumsum(shapely.get_num_coordinates(rings)).tolist()
    found = [places[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    firsts = np.searchsorted(of, np.arange(len(polygons) + 1)).tolist()
    for first, last in zip(firsts, firsts[1:], strict=False):
        yield found[first:last]


def _feature(outline: _Outline) -> object:
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": outline.rings},
        "properties": {
            "objectType": "annotation",
            "classification": {"name": outline.name, "color": outline.color},
            "measurements": outline.measurements,
        },
    }


def _polyline(outline: _Outline) -> object:
    channels = ", ".join(map(str, outline.color))
    outer, *holes = map(_points, outline.rings)
    return {
        "type": "polyline",
        "closed": True,
        "points": outer,
        "holes": holes,
        "fillColor": f"rgba({channels}, {_FILL_OPACITY})",
        "lineColor": f"rgb({channels})",
        "lineWidth": _LINE_WIDTH_PX,
        "label": {"value": outline.name},
        "group": outline.name,
        "user": outline.measurements,
    }


def _points(ring: _Ring) -> NDArray[np.float64]:
    """(N - 1, 3) x, y and 0, without the first place again at the end."""
    points = np.zeros((len(ring) - 1, 3))
    points[:, :2] = ring[:-1]
    return points


def _written(head: Mapping[str, object], name: str, items: Iterable[object]) -> Iterator[bytes]:
    """A JSON object that ends in a list, in blocks."""
    block, separator = bytearray(_dense(head)[:-1] + f',"{name}":['.encode()), b"\n"
    for item in items:
        block += separator + _dense(item)
        separator = b",\n"
        if len(block) >= BLOCK_BYTES:
            yield bytes(block)
            block.clear()
    yield bytes(block + b"\n]}\n")


def _dense(value: object) -> bytes:
    """JSON without spaces; also takes arrays and our own models."""
    return orjson.dumps(value, BaseModel.model_dump, orjson.OPT_SERIALIZE_NUMPY)
