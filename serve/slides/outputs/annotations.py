"""Regions of a slide, as files that QuPath and the Digital Slide Archive open; as a stream."""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import shapely
from PIL import ImageColor

from serve.answers.annotations import FILL_OPACITY, LINE_WIDTH_PX
from serve.slides.outputs.format import SlideFormat, SlideResult
from serve.slides.outputs.regions import Budget, Region, outlines

_UM2_DIGITS = 1
_GZIP_LEVEL = 5
"""Six takes more than twice the time for 2% less."""


def write_geojson(result: SlideResult, path: Path) -> None:
    """A FeatureCollection as QuPath 0.4 and later import it."""
    found = result.once(outlines)
    head = {"type": "FeatureCollection", "focalpath": _described(result, found.budget)}
    _write_json(path, head, "features", (_feature(result, region) for region in found.regions))


def write_dsa(result: SlideResult, path: Path) -> None:
    """An annotation document as large_image's schema has it."""
    found = result.once(outlines)
    head = {
        "name": f"{result.plan.model.name} {result.plan.model.version}",
        "description": "Regions found by FocalPath. For research use only.",
        "attributes": {"focalpath": _described(result, found.budget)},
    }
    _write_json(path, head, "elements", (_element(result, region) for region in found.regions))


def _write_json(path: Path, head: Mapping[str, object], name: str, items: Iterable[str]) -> None:
    """Write an object with a long list at its end, one item per line."""
    with _gzip(path) as file:
        file.write(f'{_dense(head)[:-1]},"{name}":['.encode())
        for index, item in enumerate(items):
            file.write((",\n" if index else "\n").encode() + item.encode())
        file.write(b"\n]}\n")


def _feature(result: SlideResult, region: Region) -> str:
    properties = {
        "objectType": "annotation",
        "classification": {
            "name": result.plan.model.classes[region.label - 1].name,
            "color": _color(result, region),
        },
        "measurements": _measurements(result, region),
    }
    geometry = shapely.to_geojson(region.polygon)
    return f'{{"type":"Feature","geometry":{geometry},"properties":{_dense(properties)}}}'


def _element(result: SlideResult, region: Region) -> str:
    channels = ", ".join(map(str, _color(result, region)))
    name = result.plan.model.classes[region.label - 1].name
    return _dense(
        {
            "type": "polyline",
            "closed": True,
            "points": _points(region.polygon.exterior),
            "holes": [_points(hole) for hole in region.polygon.interiors],
            "fillColor": f"rgba({channels}, {FILL_OPACITY})",
            "lineColor": f"rgb({channels})",
            "lineWidth": LINE_WIDTH_PX,
            "label": {"value": name},
            "group": name,
            "user": _measurements(result, region),
        }
    )


def _described(result: SlideResult, budget: Budget) -> dict[str, object]:
    """What the outlines are of, and in which frame."""
    return {
        "slide": result.name,
        "frame": "pixels of the slide's level 0; x to the right, y down, (0, 0) at its top left",
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


def _points(ring: shapely.LinearRing) -> list[list[float]]:
    return [[x, y, 0] for x, y in ring.coords[:-1]]


def _dense(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


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
DSA = SlideFormat(
    name="dsa",
    title="DSA annotation",
    description="outlines for the Digital Slide Archive, compressed",
    file="{name}.dsa.json.gz",
    media_type="application/gzip",
    write=write_dsa,
    is_outlines=True,
)
