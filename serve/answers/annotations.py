"""Regions as annotations that other programs open: QuPath and the Digital Slide Archive.

Both take coordinates in pixels, x to the right and y down: the image's, with (0, 0) at its top
left, or its slide's, where the options or the file's name say how the image lies in it. Areas in
px^2 stay those of the image's pixels.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Annotated

import shapely
from PIL import ImageColor
from pydantic import BaseModel, BeforeValidator, Field

from serve.answers.documents import (
    AnnotationDocument,
    FeatureCollection,
    Polyline,
    RegionProperties,
)
from serve.answers.format import AnswerFormat, ClassOptions, Source
from serve.answers.frame import Frame, frame_in_name
from serve.answers.polygons import Regions, trace_in_parts
from serve.contract.manifest import Manifest
from serve.inference.summary import Summary

FILL_OPACITY = 0.25
LINE_WIDTH_PX = 2
BLOCK_BYTES = 2**16
"""Least bytes of a block of a document, but for its last one."""


_Coordinate = Annotated[float, Field(ge=-1e9, le=1e9)]


def _split_origin(value: object) -> object:
    """Also take `1024,2048`, in one word."""
    if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], str):
        return value[0].split(",")
    return value


class RegionOptions(ClassOptions):
    """Which regions are outlined, and how exactly."""

    simplify_px: float = Field(
        0.0,
        ge=0,
        le=100,
        description="simplify outlines by about so many pixels; 0: exact",
        examples=[1.5],
    )
    min_area_px: int = Field(
        0, ge=0, le=10**9, description="leave out regions of fewer pixels", examples=[64]
    )
    origin: Annotated[list[_Coordinate] | None, BeforeValidator(_split_origin)] = Field(
        None,
        min_length=2,
        max_length=2,
        description="x and y of the image's top left corner in its slide's pixels, into which the "
        "polygons are put; by default what QuPath wrote into the file's name, "
        "`[d=2,x=1024,y=2048,w=512,h=512]`, or else 0 0",
        examples=[[1024, 2048]],
    )
    downsample: float = Field(
        0.0,
        ge=0,
        le=10**4,
        description="pixels of the slide for one of the image; 0: by the file's name, or else 1",
        examples=[4.0],
    )

    def frame(self, name: str, width_px: int, height_px: int) -> Frame:
        """Where the image lies: as the options say, or else its name.

        Raises:
            OptionError: the name is of an image of another size.
        """
        named = frame_in_name(name, width_px, height_px, is_downsample_given=self.downsample > 0)
        if self.origin:
            named = replace(named, origin=(self.origin[0], self.origin[1]))
        if self.downsample:
            named = replace(named, downsample=(self.downsample, self.downsample))
        return named


def geojson(parts: Iterable[Regions], summary: Summary, manifest: Manifest) -> Iterator[bytes]:
    """A GeoJSON FeatureCollection as QuPath 0.4 and later import it, block by block.

    Each feature is an annotation with a class, its colour and measurements. QuPath averages
    nothing over annotations, so each has its own area and mean confidence.
    """
    features = (feature for part in parts for feature in _features(part, summary, manifest))
    return _written('{"type":"FeatureCollection","features":[', features)


def _features(regions: Regions, summary: Summary, manifest: Manifest) -> Iterator[str]:
    for polygon, (name, color, measurements) in zip(
        regions.polygons, _described(regions, summary, manifest), strict=True
    ):
        properties: RegionProperties = {
            "objectType": "annotation",
            "classification": {"name": name, "color": color},
            "measurements": measurements,
        }
        geometry = shapely.to_geojson(polygon)
        yield f'{{"type":"Feature","geometry":{geometry},"properties":{_dense(properties)}}}'


def _written(head: str, items: Iterator[str]) -> Iterator[bytes]:
    """A JSON document that ends in a list, in blocks: only one block and one item are held."""
    block, separator = bytearray(head.encode()), ""
    for item in items:
        block += f"{separator}{item}".encode()
        separator = ","
        if len(block) >= BLOCK_BYTES:
            yield bytes(block)
            block.clear()
    yield bytes(block + b"]}")


def dsa_annotation(
    parts: Iterable[Regions], summary: Summary, manifest: Manifest
) -> Iterator[bytes]:
    """An annotation document after large_image's schema: closed polylines with holes.

    It comes block by block.
    """
    document: AnnotationDocument = {
        "name": f"{manifest.name} {manifest.version}",
        "description": "Regions found by FocalPath. For research use only.",
        "attributes": {
            "model": summary.model,
            "image": summary.image,
            "classes": summary.classes,
        },
        "elements": [],
    }
    head = _dense(document).removesuffix("]}")
    lines = (line for part in parts for line in _polylines(part, summary, manifest))
    return _written(head, map(_dense, lines))


def _polylines(regions: Regions, summary: Summary, manifest: Manifest) -> Iterator[Polyline]:
    for polygon, (name, color, measurements) in zip(
        regions.polygons, _described(regions, summary, manifest), strict=True
    ):
        channels = ", ".join(map(str, color))
        yield {
            "type": "polyline",
            "closed": True,
            "points": _points(polygon.exterior),
            "holes": [_points(hole) for hole in polygon.interiors],
            "fillColor": f"rgba({channels}, {FILL_OPACITY})",
            "lineColor": f"rgb({channels})",
            "lineWidth": LINE_WIDTH_PX,
            "label": {"value": name},
            "group": name,
            "user": measurements,
        }


def _described(
    regions: Regions, summary: Summary, manifest: Manifest
) -> Iterator[tuple[str, list[int], dict[str, float]]]:
    """Name, colour and measurements of each region."""
    colors = [list(ImageColor.getrgb(tissue.color)) for tissue in manifest.classes]
    um2_per_px = summary.image.um2_per_px
    for label, area, confidence in zip(
        regions.labels, regions.area_px, regions.mean_confidence, strict=True
    ):
        measurements = {"Area px^2": float(area)}
        if um2_per_px is not None:
            measurements["Area um^2"] = round(float(area) * um2_per_px, 3)
        measurements["Mean confidence"] = round(float(confidence), 4)
        yield manifest.classes[label - 1].name, colors[label - 1], measurements


def _points(ring: shapely.LinearRing) -> list[list[float]]:
    """The ring's points as (x, y, 0), without the first one repeated at the end."""
    return [[x, y, 0] for x, y in ring.coords[:-1]]


def _dense(value: object) -> str:
    """JSON without spaces; also takes our own models."""
    return json.dumps(
        value, separators=(",", ":"), ensure_ascii=False, default=BaseModel.model_dump
    )


def _regions(source: Source, options: RegionOptions) -> Iterator[Regions]:
    """The regions in their slide's frame; too many are refused at once, not while they come."""
    parts = trace_in_parts(
        source.result.labels,
        source.result.confidence,
        simplify_px=options.simplify_px,
        min_area_px=options.min_area_px,
        shown=options.shown(source.manifest),
    )
    height_px, width_px = source.result.labels.shape
    frame = options.frame(source.name, width_px, height_px)
    return (replace(part, polygons=frame.place(part.polygons)) for part in parts)


GEOJSON = AnswerFormat(
    name="geojson",
    title="Outlines",
    kind="GeoJSON for QuPath",
    description="Regions as QuPath's annotations: polygons with holes, classes, colours and "
    "measurements.",
    media_type="application/geo+json",
    suffix=".geojson",
    options=RegionOptions,
    document=FeatureCollection,
    stream=lambda source, options: geojson(
        _regions(source, options), source.result.summary, source.manifest
    ),
)
DSA = AnswerFormat(
    name="dsa",
    title="Outlines",
    kind="JSON for the Digital Slide Archive",
    description="Regions as an annotation document of the Digital Slide Archive.",
    media_type="application/json",
    suffix=".dsa.json",
    options=RegionOptions,
    document=AnnotationDocument,
    stream=lambda source, options: dsa_annotation(
        _regions(source, options), source.result.summary, source.manifest
    ),
)
