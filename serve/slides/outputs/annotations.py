"""Regions of a slide, as files that QuPath and the Digital Slide Archive open; as a stream."""

import gzip
from collections.abc import Iterable
from pathlib import Path

from serve.answers.frame import Frame
from serve.answers.outlines import Legend, dsa_annotation, geojson
from serve.images.readers.geojson import STATED
from serve.slides.outputs.format import SlideFormat, SlideResult
from serve.slides.outputs.regions import outlines

_GZIP_LEVEL = 5
"""Six takes more than twice the time for 2% less."""
_LEVEL0_FRAME = "pixels of the slide's level 0; x to the right, y down, (0, 0) at its top left"
_BOUNDS_FRAME = (
    f"pixels of the slide's level 0, counted from {STATED}, the top left of its scanned part"
)


def write_geojson(result: SlideResult, path: Path) -> None:
    """A FeatureCollection as QuPath 0.4 and later import it, in pixels of level 0."""
    _write_geojson(result, path, (0, 0))


def write_qupath(result: SlideResult, path: Path) -> None:
    """The same in pixels of what QuPath shows: the scanned part, as OpenSlide states it."""
    _write_geojson(result, path, result.plan.slide.bounds[:2])


def _write_geojson(result: SlideResult, path: Path, origin: tuple[int, int]) -> None:
    described = {**_described(result), STATED: origin}
    if any(origin):
        described["frame"] = _BOUNDS_FRAME
    frame = Frame(origin=(-origin[0], -origin[1]))
    parts = (
        part._replace(polygons=frame.place(part.polygons)) for part in result.once(outlines).parts
    )
    _write(path, geojson(parts, _legend(result), {"focalpath": described}))


def write_dsa(result: SlideResult, path: Path) -> None:
    """An annotation document as large_image's schema has it."""
    parts, attributes = result.once(outlines).parts, {"focalpath": _described(result)}
    _write(path, dsa_annotation(parts, _legend(result), result.summary.model, attributes))


def _described(result: SlideResult) -> dict[str, object]:
    """What the outlines are of, and in which frame."""
    budget = result.once(outlines).budget
    return {
        "slide": result.name,
        "frame": _LEVEL0_FRAME,
        "model": result.summary.model,
        "simplified_by_cells": budget.simplify_cells,
        "least_area_cells": budget.min_cells,
        "um_per_cell": result.plan.um_per_cell,
    }


def _legend(result: SlideResult) -> Legend:
    y, x = result.plan.level0_px_per_cell
    return Legend(result.plan.model.classes, y * x * result.plan.slide.mpp**2, y * x)


def _write(path: Path, blocks: Iterable[bytes]) -> None:
    """Write a gzip file without its name and the time, so that it is the same at each writing."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", _GZIP_LEVEL, raw, mtime=0) as file:
        file.writelines(blocks)


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
