"""Regions of a slide, as files that QuPath and the Digital Slide Archive open; as a stream."""

import gzip
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import orjson
import shapely
from numpy.typing import NDArray
from PIL import ImageColor

from serve.answers.annotations import FILL_OPACITY, LINE_WIDTH_PX
from serve.images.readers.geojson import STATED
from serve.slides.outputs.format import SlideFormat, SlideResult
from serve.slides.outputs.regions import Budget, Region, outlines

_UM2_DIGITS = 1
_GZIP_LEVEL = 5
"""Six takes more than twice the time for 2% less."""
_REGIONS_AT_ONCE = 1000
"""Regions whose coordinates are taken out of their polygons at once."""
_LEVEL0_FRAME = "pixels of the slide's level 0; x to the right, y down, (0, 0) at its top left"
_BOUNDS_FRAME = (
    f"pixels of the slide's level 0, counted from {STATED}, the top left of its scanned part"
)
_Place = tuple[int, int]
"""x and y, in pixels of level 0."""
_Ring = NDArray[np.float64]
"""(N, 2) x and y; the last place is the first one."""


def write_geojson(result: SlideResult, path: Path) -> None:
    """A FeatureCollection as QuPath 0.4 and later import it, in pixels of level 0."""
    _write_geojson(result, path, (0, 0))


def write_qupath(result: SlideResult, path: Path) -> None:
    """The same in pixels of what QuPath shows: the scanned part, as OpenSlide states it."""
    _write_geojson(result, path, result.plan.slide.bounds[:2])


def _write_geojson(result: SlideResult, path: Path, origin: _Place) -> None:
    found = result.once(outlines)
    described = {**_described(result, found.budget), STATED: origin}
    if any(origin):
        described["frame"] = _BOUNDS_FRAME
    head = {"type": "FeatureCollection", "focalpath": described}
    _write_json(path, head, "features", result, found.regions, _feature, origin)


def write_dsa(result: SlideResult, path: Path) -> None:
    """An annotation document as large_image's schema has it."""
    found = result.once(outlines)
    head = {
        "name": f"{result.plan.model.name} {result.plan.model.version}",
        "description": "Regions found by FocalPath. For research use only.",
        "attributes": {"focalpath": _described(result, found.budget)},
    }
    _write_json(path, head, "elements", result, found.regions, _element)


def _write_json(
    path: Path,
    head: Mapping[str, object],
    name: str,
    result: SlideResult,
    regions: Sequence[Region],
    describe: Callable[[SlideResult, Region, list[_Ring]], object],
    origin: _Place = (0, 0),
) -> None:
    """Write an object with a long list at its end, one region per line."""
    separator = b"\n"
    with _gzip(path) as file:
        file.write(_dense(head)[:-1] + f',"{name}":['.encode())
        for region, rings in _with_rings(regions, origin):
            file.write(separator + _dense(describe(result, region, rings)))
            separator = b",\n"
        file.write(b"\n]}\n")


def _with_rings(regions: Sequence[Region], origin: _Place) -> Iterator[tuple[Region, list[_Ring]]]:
    """Each region with its rings, the outer one first, counted from `origin`."""
    for begin in range(0, len(regions), _REGIONS_AT_ONCE):
        some = regions[begin : begin + _REGIONS_AT_ONCE]
        rings, of = shapely.get_rings([region.polygon for region in some], return_index=True)
        places = shapely.get_coordinates(rings) - origin
        ends = np.cumsum(shapely.get_num_coordinates(rings)).tolist()
        found = [places[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
        firsts = np.searchsorted(of, np.arange(len(some) + 1)).tolist()
        for region, first, last in zip(some, firsts, firsts[1:], strict=False):
            yield region, found[first:last]


def _feature(result: SlideResult, region: Region, rings: list[_Ring]) -> object:
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": rings},
        "properties": {
            "objectType": "annotation",
            "classification": {
                "name": result.plan.model.classes[region.label - 1].name,
                "color": _color(result, region),
            },
            "measurements": _measurements(result, region),
        },
    }


def _element(result: SlideResult, region: Region, rings: list[_Ring]) -> object:
    channels = ", ".join(map(str, _color(result, region)))
    name = result.plan.model.classes[region.label - 1].name
    outer, *holes = map(_points, rings)
    return {
        "type": "polyline",
        "closed": True,
        "points": outer,
        "holes": holes,
        "fillColor": f"rgba({channels}, {FILL_OPACITY})",
        "lineColor": f"rgb({channels})",
        "lineWidth": LINE_WIDTH_PX,
        "label": {"value": name},
        "group": name,
        "user": _measurements(result, region),
    }


def _described(result: SlideResult, budget: Budget) -> dict[str, object]:
    """What the outlines are of, and in which frame."""
    return {
        "slide": result.name,
        "frame": _LEVEL0_FRAME,
        "model": result.summary.model.model_dump(),
        "simplified_by_cells": budget.simplify_cells,
        "least_area_cells": budget.min_cells,
        "um_per_cell": result.plan.um_per_cell,
    }


def _measurements(result: SlideResult, region: Region) -> dict[str, float]:
    y, x = result.plan.level0_px_per_cell
    area_px = region.num_cells * y * x
    return {
        "Area px^2": round(area_px, _UM2_DIGITS),
        "Area um^2": round(area_px * result.plan.slide.mpp**2, _UM2_DIGITS),
        "Mean confidence": round(region.mean_confidence, 4),
    }


def _color(result: SlideResult, region: Region) -> list[int]:
    return list(ImageColor.getrgb(result.plan.model.classes[region.label - 1].color)[:3])


def _points(ring: _Ring) -> NDArray[np.float64]:
    """(N - 1, 3) x, y and 0, without the first place again at the end."""
    points = np.zeros((len(ring) - 1, 3))
    points[:, :2] = ring[:-1]
    return points


def _dense(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


@contextmanager
def _gzip(path: Path) -> Iterator[gzip.GzipFile]:
    """A gzip file without its name and the time, so that it is the same at each writing."""
    with (
        path.open("wb") as raw,
        gzip.GzipFile(
            filename="", mode="wb", compresslevel=_GZIP_LEVEL, fileobj=raw, mtime=0
        ) as file,
    ):
        yield file


GEOJSON = SlideFormat(
    name="geojson",
    title="GeoJSON",
    description="outlines for QuPath, compressed",
    file="{name}.geojson.gz",
    media_type="application/gzip",
    write=write_geojson,
    is_outlines=True,
)
QUPATH = SlideFormat(
    name="qupath",
    title="GeoJSON in QuPath's frame",
    description="outlines for slides that QuPath crops to their scanned part, such as MIRAX",
    file="{name}.qupath.geojson.gz",
    media_type="application/gzip",
    write=write_qupath,
    is_outlines=True,
)
DSA = SlideFormat(
    name="dsa",
    title="DSA annotation",
    description="outlines for the Digital Slide Archive, compressed",
    file="{name}.dsa.json.gz",
    media_type="application/gzip",
    write=write_dsa,
    is_outlines=True,
)
