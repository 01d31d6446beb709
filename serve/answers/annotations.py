"""Regions as annotations that other programs open: QuPath and the Digital Slide Archive.

Both take coordinates in pixels, x to the right and y down: the image's, with (0, 0) at its top
left, or its slide's, where the options or the file's name say how the image lies in it. Areas in
px^2 stay those of the image's pixels.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

from pydantic import BeforeValidator, Field

from serve.answers.documents import AnnotationDocument, FeatureCollection
from serve.answers.format import AnswerFormat, ClassOptions, Source
from serve.answers.frame import Frame, frame_in_name
from serve.answers.outlines import Legend, dsa_annotation, geojson
from serve.answers.polygons import Regions, trace_regions

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

    def frame(self, source: Source) -> Frame:
        """Where the image lies: as the options say, or else the source.

        Raises:
            OptionError: the name is of an image of another size.
        """
        height_px, width_px = source.result.labels.shape
        frame = source.frame or frame_in_name(
            source.name, width_px, height_px, is_downsample_given=self.downsample > 0
        )
        if self.origin:
            frame = replace(frame, origin=(self.origin[0], self.origin[1]))
        if self.downsample:
            frame = replace(frame, downsample=(self.downsample, self.downsample))
        return frame


def _regions(source: Source, options: RegionOptions) -> Iterator[Regions]:
    """The regions in their slide's frame; too many are refused at once, not while they come."""
    parts = trace_regions(
        source.result.labels,
        source.result.confidence,
        simplify_px=options.simplify_px,
        min_area_px=options.min_area_px,
        shown=options.shown(source.manifest),
    )
    frame = options.frame(source)
    return (part._replace(polygons=frame.place(part.polygons)) for part in parts)


def _legend(source: Source) -> Legend:
    return Legend(source.manifest.classes, source.result.summary.image.um2_per_px)


def _geojson(source: Source, options: RegionOptions) -> Iterator[bytes]:
    return geojson(_regions(source, options), _legend(source))


def _dsa(source: Source, options: RegionOptions) -> Iterator[bytes]:
    summary = source.result.summary
    attributes = {"model": summary.model, "image": summary.image, "classes": summary.classes}
    return dsa_annotation(_regions(source, options), _legend(source), summary.model, attributes)


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
    write=_geojson,
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
    write=_dsa,
)
