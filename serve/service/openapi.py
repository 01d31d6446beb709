"""The OpenAPI document: bodies, answers and errors of the endpoints."""

import json
from typing import Any

from fastapi import FastAPI
from pydantic import ConfigDict, Field, TypeAdapter

from serve.answers.documents import batch_line
from serve.answers.format import AnswerFormat
from serve.answers.registry import FORMATS, batch_formats
from serve.contract.errors import (
    AccessError,
    BackendUnavailableError,
    BusyError,
    ImageError,
    ImageTooLargeError,
    OptionError,
    TookTooLongError,
    UploadTooSlowError,
)
from serve.contract.manifest import Artefact, Manifest, Parity, TissueClass, interface
from serve.contract.strict import Strict
from serve.images.mpp import MAX_MPP, MIN_MPP
from serve.inference.backend import RunsOn
from serve.service.access import OPEN_PATHS
from serve.service.error_answers import INTERNAL_CODE

Responses = dict[int | str, dict[str, Any]]
_BATCH_LINE = "BatchLine"


class ErrorAnswer(Strict):
    """The answer of every error."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"error": "The file is empty. Send one PNG, ...", "code": ImageError.code}]
        }
    )

    error: str = Field(description="for people; its words may change")
    code: str = Field(description="names the kind of error for programs; stays the same")


def _form_body(
    field: str, description: str, *content_types: str, several: bool = False
) -> dict[str, Any]:
    """A multipart body. `serve.service.uploads` reads it, so FastAPI does not know it."""
    file = {"type": "string", "format": "binary", "description": description}
    mpp = {
        "type": "number",
        "minimum": MIN_MPP,
        "maximum": MAX_MPP,
        "description": "um per pixel",
        "examples": [0.25],
    }
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


_IMAGE_TYPES = ("image/png", "image/jpeg", "image/tiff", "image/webp")
IMAGE_BODY = _form_body(
    "image", "an image with 8 bits per channel, known by its content alone", *_IMAGE_TYPES
)
BATCH_BODY = _form_body(
    "images", "an image, or a zip of images", *_IMAGE_TYPES, "application/zip", several=True
)


class Schemas:
    """The JSON schemas of the documents that the registered formats answer with.

    FastAPI does not know them, since the endpoints answer with bytes.
    """

    def __init__(self) -> None:
        documents = {entry.name: entry.document for entry in FORMATS.values() if entry.document}
        documents[_BATCH_LINE] = batch_line(batch_formats())
        self._by_name, definitions = TypeAdapter.json_schemas(
            [(name, "serialization", TypeAdapter(kind)) for name, kind in documents.items()],
            ref_template="#/components/schemas/{model}",
        )
        self.components: dict[str, Any] = {
            **definitions["$defs"],
            _BATCH_LINE: self._by_name[_BATCH_LINE, "serialization"],
        }

    def answer(self, entry: AnswerFormat) -> Responses:
        """The description of a format's answer."""
        if entry.document is None:
            return binary_answer(entry.media_type, entry.content)
        return _answer(entry.media_type, self._by_name[entry.name, "serialization"])

    def lines(self) -> Responses:
        """The description of the answer of /batch."""
        examples = self.components[_BATCH_LINE]["examples"]
        return text_answer(
            "application/x-ndjson",
            "".join(json.dumps(line) + "\n" for line in examples),
            f"One line of JSON per file, a `{_BATCH_LINE}`.",
        )


def binary_answer(media_type: str, description: str = "OK") -> Responses:
    """A picture or arrays."""
    return _answer(media_type, {"type": "string", "format": "binary"}, description)


def text_answer(media_type: str, example: str, description: str = "OK") -> Responses:
    """Lines of text."""
    return _answer(media_type, {"type": "string", "examples": [example]}, description)


def _answer(media_type: str, schema: dict[str, Any], description: str = "OK") -> Responses:
    return {200: {"description": description, "content": {media_type: {"schema": schema}}}}


_MANIFEST_EXAMPLE = Manifest(
    name="segmenter",
    version="1.0.0",
    classes=(
        TissueClass(name="Tumor", color="#d62728"),
        TissueClass(name="Stroma", color="#2ca02c"),
    ),
    mpp=0.5,
    tile_size_px=1024,
    max_batch_size=4,
    opset=20,
    inputs=interface(1024, 2)[0],
    outputs=interface(1024, 2)[1],
    class_attention_bias=(0.0, 0.4),
    checkpoint_sha256="0" * 64,
    artefacts=(
        Artefact(
            file="model.onnx",
            format="onnx",
            precision="fp32",
            sha256="0" * 64,
            parity=Parity(num_tiles=8, label_agreement=1.0, max_logit_difference=2e-5),
        ),
    ),
)
_RUNTIME_EXAMPLE = RunsOn(
    provider="cpu",
    precision="fp32",
    runtime="ONNX Runtime 1.31.1",
    processor="AMD EPYC 9654 96-Core Processor (x86_64 AMD avx2 avx512)",
    reason="nothing else may run here",
)


def document(model: type, example: object, **more: object) -> dict[str, Any]:
    """A JSON answer with an example."""
    return {"model": model, "content": {"application/json": {"example": example}}, **more}


def error(description: str, code: str, message: str, **more: object) -> dict[str, Any]:
    """The answer of an error, with an example of its message."""
    return document(ErrorAnswer, {"error": message, "code": code}, description=description, **more)


MANIFEST: Responses = {200: document(Manifest, _MANIFEST_EXAMPLE.model_dump(mode="json"))}
RUNTIME: Responses = {200: document(RunsOn, _RUNTIME_EXAMPLE.model_dump(mode="json"))}


ERRORS: Responses = {
    500: error(
        "The service failed.",
        INTERNAL_CODE,
        "The service failed on this request. Its log says more.",
    ),
    503: error(
        "The model is not available now.",
        BackendUnavailableError.code,
        "Triton at 127.0.0.1:8001 does not answer.",
    ),
}
UPLOAD_ERRORS: Responses = {
    400: error(
        "The form, the image or an option cannot be used.",
        OptionError.code,
        "mpp is 100 um per pixel, expected 0.05 to 20. Leave it out if it is not known.",
    ),
    408: error(
        "The upload stopped arriving.",
        UploadTooSlowError.code,
        "No more of the upload has arrived for 30 s. Send it again.",
    ),
    413: error(
        "The upload, or the image in it, is over a limit.",
        ImageTooLargeError.code,
        "The image is 20000 x 20000: 400000000 pixels, at most 64000000 are accepted. Crop it.",
    ),
    429: error(
        "Too many requests, or images of too many tiles, are waiting.",
        BusyError.code,
        "32 requests are waiting already. Try again later.",
        headers={
            "Retry-After": {
                "description": "seconds to wait",
                "required": True,
                "schema": {"type": "integer", "examples": [1]},
            }
        },
    ),
    **ERRORS,
    504: error(
        "The request took too long.",
        TookTooLongError.code,
        "The request took longer than 300 s. Send a smaller image.",
    ),
}
KEY_ERRORS: Responses = {
    401: error(
        "The key is missing or unknown; only where the service has keys.",
        AccessError.code,
        "The request has no API key. Send `Authorization: Bearer KEY` or `X-API-Key`.",
        headers={
            "WWW-Authenticate": {"required": True, "schema": {"type": "string", "const": "Bearer"}}
        },
    )
}

_REQUEST_ID = {
    "description": "the request's own `X-Request-ID` or a new one, as in the log",
    "required": True,
    "schema": {"type": "string", "examples": ["0f2d8c6b7e3a4d5f9b1c2a3e4d5f6a7b"]},
}


def _health(description: str, answers: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """A route of BentoML; its answers by status, each a description and an example."""
    responses = {
        status: text_answer("text/plain", example, said)[200]
        for status, (said, example) in answers.items()
    }
    return {"get": {"description": description, "responses": responses}}


HEALTH_PATHS = {
    "/livez": _health("Whether the process is alive.", {"200": ("Alive.", "\n")}),
    "/readyz": _health(
        "Whether the service can answer requests now: the bundle's checksums are right, the model "
        "is loaded and gave the warm-up image the labels that it had at export.",
        {"200": ("Ready.", "\n"), "503": ("Why not.", "The model is being opened.")},
    ),
}
"""BentoML's own routes, which do not pass `serve.service.gateway`."""


class DescribedApp(FastAPI):
    """FastAPI that also describes what it cannot derive: headers, statuses, other documents."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        if self.openapi_schema:
            return self.openapi_schema
        document = super().openapi()
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # a 400 here
                if path in OPEN_PATHS:
                    operation.pop("security", None)
                for response in operation["responses"].values():
                    reference = {"$ref": "#/components/headers/RequestId"}
                    response.setdefault("headers", {})["X-Request-ID"] = reference
        components = document["components"]
        components["headers"] = {"RequestId": _REQUEST_ID}
        for name in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(name, None)
        components["schemas"] = {**Schemas().components, **components["schemas"]}
        document["paths"] |= HEALTH_PATHS
        return document
