"""The JSON documents of other programs, and the lines of a batch, as types with an example each."""

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import numpy as np
import shapely
from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from serve.answers.format import AnswerFormat
from serve.answers.outlines import Legend, dsa_annotation, geojson
from serve.answers.polygons import Regions
from serve.contract.manifest import TissueClass
from serve.inference.summary import SUMMARY_EXAMPLE, ClassSummary, ImageInfo, ModelName

_REGION = Regions(
    np.array([shapely.box(0, 0, 512, 512)]),
    np.array([1], np.uint8),
    np.array([512 * 512]),
    np.array([0.93]),
)
_LEGEND = Legend((TissueClass(name="Tumor", color="#d62728"),), um2_per_px=0.25**2)
_GEOJSON_EXAMPLE = json.loads(b"".join(geojson([_REGION], _LEGEND)))
_DSA_EXAMPLE = json.loads(
    b"".join(
        dsa_annotation(
            [_REGION],
            _LEGEND,
            ModelName.model_validate(SUMMARY_EXAMPLE["model"]),
            {name: SUMMARY_EXAMPLE[name] for name in ("model", "image", "classes")},
        )
    )
)
_BATCH_EXAMPLES: list[dict[str, Any]] = [
    {
        "index": 0,
        "name": "1.png",
        "status": 200,
        "mpp": 0.25,
        "mpp_source": "OME-XML",
        "outputs": {"json": SUMMARY_EXAMPLE},
    },
    {
        "index": 1,
        "name": "2.txt",
        "status": 400,
        "error": "The file is not an image that can be read.",
        "code": "image_unusable",
    },
]

Measurements = Annotated[
    dict[str, float],
    Field(description="of the region: area in px^2, in um^2 where mpp is known, mean confidence"),
]
Base64 = Annotated[str, Field(description="a PNG in base64")]


class Classification(TypedDict):
    """A class of QuPath."""

    name: str
    color: Annotated[list[int], Field(description="red, green and blue, 0 to 255")]


class RegionProperties(TypedDict):
    """What QuPath reads beside the outline."""

    objectType: Literal["annotation"]
    classification: Classification
    measurements: Measurements


class Polygon(TypedDict):
    """Closed rings, the holes after the outer one."""

    type: Literal["Polygon"]
    coordinates: Annotated[
        list[list[list[float]]], Field(description="x and y in pixels of the image as sent")
    ]


class Feature(TypedDict):
    """One region."""

    type: Literal["Feature"]
    geometry: Polygon
    properties: RegionProperties


@with_config(ConfigDict(json_schema_extra={"examples": [_GEOJSON_EXAMPLE]}))
class FeatureCollection(TypedDict):
    """GeoJSON as QuPath 0.4 and later import it."""

    type: Literal["FeatureCollection"]
    features: list[Feature]


class ElementLabel(TypedDict):
    """A name to show."""

    value: str


Points = Annotated[
    list[list[float]], Field(description="x, y and 0, in pixels; not closed by the first one again")
]


class Polyline(TypedDict):
    """One region, as an element of large_image's annotation schema."""

    type: Literal["polyline"]
    closed: Literal[True]
    points: Points
    holes: list[Points]
    fillColor: str
    lineColor: str
    lineWidth: float
    label: ElementLabel
    group: str
    user: Measurements


class AnnotationAttributes(TypedDict):
    """What the regions are of."""

    model: ModelName
    image: ImageInfo
    classes: tuple[ClassSummary, ...]


@with_config(ConfigDict(json_schema_extra={"examples": [_DSA_EXAMPLE]}))
class AnnotationDocument(TypedDict):
    """An annotation as the Digital Slide Archive imports it."""

    name: str
    description: str
    attributes: AnnotationAttributes
    elements: list[Polyline]


class BatchFailure(TypedDict):
    """The line of a file that cannot be used; the others are answered all the same."""

    index: int
    name: str
    status: Annotated[int, Field(ge=400, le=599)]
    error: str
    code: str


def batch_line(formats: Iterable[AnswerFormat]) -> Any:
    """The type of a line of /batch, which offers these formats."""
    types: dict[str, Any] = {
        entry.name: Base64 if entry.document is None else entry.document for entry in formats
    }
    outputs = TypedDict("BatchOutputs", types, total=False)  # type: ignore[misc]
    outputs.__doc__ = "The outputs that were asked for."
    fields = {
        "index": int,
        "name": str,
        "status": Literal[200],
        "mpp": Annotated[
            float | None, Field(description="um per pixel that the image was taken to have")
        ],
        "mpp_source": Annotated[str, Field(description="where `mpp` is from; see `ImageInfo`")],
        "outputs": outputs,
    }
    answer = TypedDict("BatchAnswer", fields)  # type: ignore[misc]
    answer.__doc__ = "The line of a file that was segmented."
    return Annotated[
        answer | BatchFailure, Field(json_schema_extra={"examples": list(_BATCH_EXAMPLES)})
    ]
