"""The words of the OpenAPI document: options with their bounds, bodies, answers."""

from typing import Annotated, Any, Literal

from fastapi import Query
from pydantic import BaseModel, ConfigDict

from serve.images import MAX_MPP, MIN_MPP

Responses = dict[int | str, dict[str, Any]]

Mpp = Annotated[
    float | None,
    Query(
        ge=MIN_MPP,
        le=MAX_MPP,
        description="um per pixel of the image; before the file's own, which is before the model's",
    ),
]
Alpha = Annotated[
    float, Query(ge=0, le=1, description="0 shows the image only, 1 the colours only")
]
Classes = Annotated[
    list[str],
    Query(default_factory=list, description="names of the classes to show; by default all"),
]
SimplifyPx = Annotated[
    float,
    Query(ge=0, le=100, description="simplify outlines by about so many pixels; 0: exact"),
]
MinAreaPx = Annotated[int, Query(ge=0, le=10**9, description="leave out regions of fewer pixels")]
WithProbabilities = Annotated[
    bool, Query(description="also the probabilities of all classes, as /probabilities has them")
]
BatchOutput = Literal["json", "labels", "confidence", "overlay", "geojson", "dsa"]
Outputs = Annotated[
    list[BatchOutput],
    Query(
        default_factory=lambda: ["json"],
        description="what to answer for each file; pictures are in base64",
    ),
]


class ErrorAnswer(BaseModel):
    """What every error is answered with."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"error": "The file is empty. Send one PNG, ..."}]}
    )

    error: str


def _form_body(
    field: str, description: str, *content_types: str, several: bool = False
) -> dict[str, Any]:
    """A multipart body, which `serve.uploads` reads and FastAPI does not see."""
    file = {"type": "string", "format": "binary", "description": description}
    mpp = {"type": "number", "minimum": MIN_MPP, "maximum": MAX_MPP, "description": "um per pixel"}
    schema = {
        "type": "object",
        "required": [field],
        "additionalProperties": False,
        "properties": {
            field: {"type": "array", "items": file, "minItems": 1} if several else file,
            "mpp": mpp,
        },
    }
    encoding = {field: {"contentType": ", ".join(content_types)}}
    content = {"multipart/form-data": {"schema": schema, "encoding": encoding}}
    return {"requestBody": {"required": True, "content": content}}


def binary_answer(media_type: str) -> Responses:
    """A picture or arrays."""
    return _answer(media_type, {"type": "string", "format": "binary"})


def json_answer(media_type: str) -> Responses:
    """A document of another program's format."""
    return _answer(media_type, {"type": "object"})


def text_answer(media_type: str) -> Responses:
    """Lines of text."""
    return _answer(media_type, {"type": "string"})


def _answer(media_type: str, schema: dict[str, str]) -> Responses:
    return {200: {"description": "OK", "content": {media_type: {"schema": schema}}}}


ERRORS: Responses = {
    "4XX": {"model": ErrorAnswer, "description": "The image or an option cannot be used."},
    503: {"model": ErrorAnswer, "description": "The model is not available now."},
    504: {"model": ErrorAnswer, "description": "The request took too long."},
}
_IMAGE_TYPES = ("image/png", "image/jpeg", "image/tiff", "image/webp")
IMAGE_BODY = _form_body(
    "image", "an image with 8 bits a channel, known by its content alone", *_IMAGE_TYPES
)
BATCH_BODY = _form_body(
    "images", "an image, or a zip of images", *_IMAGE_TYPES, "application/zip", several=True
)
