"""The OpenAPI descriptions of the routes of slides and jobs, with examples."""

from typing import Any

from serve.contract.errors import NotFoundError
from serve.images.readers.errors import SlideFormatError
from serve.service.openapi import ERRORS, UPLOAD_ERRORS, Responses, document, error
from serve.service.slides.documents import Job, JobList, SlideInfo, SlideList

_ID, _JOB_ID = "0f2d8c6b7e3a4d5f", "0f2d8c6b7e3a4d5f9b1c2a3e4d5f6a7b"
_JOB_EXAMPLE: dict[str, Any] = {
    "id": _JOB_ID,
    "slide": _ID,
    "name": "case-7",
    "status": "running",
    "request": {
        "slide": _ID,
        "mpp": None,
        "tissue": "auto",
        "formats": ["ome-zarr", "overview", "geojson"],
        "overwrite": False,
    },
    "created": 1764100000.0,
    "started": 1764100002.5,
    "ended": None,
    "tiles": 1200,
    "tiles_done": 300,
    "tiles_per_second": 4.0,
    "seconds_left": 225.0,
    "step": "",
    "attempts": 1,
    "error": "",
    "code": "",
}
_ENTRY: dict[str, Any] = {
    "id": _ID,
    "name": "case-7",
    "file": "ward/case-7.svs",
    "num_bytes": 134000000,
    "state": "running",
    "problem": "",
}
_SLIDE_EXAMPLE: dict[str, Any] = {
    **_ENTRY,
    "width_px": 20000,
    "height_px": 20000,
    "mpp": 0.25,
    "mpp_source": "Aperio MPP",
    "reader": "tiff",
    "tiles": {
        "width_px": 20000,
        "height_px": 20000,
        "tile_px": 254,
        "overlap_px": 1,
        "num_levels": 16,
        "origin_px": [0, 0],
        "version": "5c1f0e9a7b3d2e4f",
    },
    "max_region_px": 21900000,
    "result": None,
    "job": _JOB_EXAMPLE,
}


def _files(description: str, *media_types: str) -> Responses:
    """An answer that is a file of one of these types."""
    binary = {"type": "string", "format": "binary"}
    content = {
        media_type: {"schema": {"type": "object"} if "json" in media_type else binary}
        for media_type in media_types
    }
    return {200: {"description": description, "content": content}}


_NOT_MODIFIED: Responses = {
    304: {"description": "As the `If-None-Match` of the request says it is."}
}
SLIDES: Responses = {200: document(SlideList, {"slides": [_ENTRY]}, description="The slides.")}
SLIDE: Responses = {200: document(SlideInfo, _SLIDE_EXAMPLE, description="The slide.")}
TILE = _files("The tile.", "image/jpeg") | _NOT_MODIFIED
THUMBNAIL = _files("The thumbnail.", "image/jpeg") | _NOT_MODIFIED
RESULT_TILE = _files("The tile.", "image/png", "application/x-npz") | _NOT_MODIFIED
REGION = _files(
    "As the route of the format answers.",
    *("application/json", "application/geo+json", "image/png", "application/x-npz"),
)
RESULT_FILE: Responses = {
    **_files(
        "The file.",
        *("application/json", "application/geo+json", "application/gzip", "application/zip"),
        *("application/dicom", "image/png", "image/tiff"),
    ),
    206: {"description": "The part of the file that the `Range` of the request asks for."},
    416: {"description": "The file has no part that the `Range` of the request asks for."},
    **_NOT_MODIFIED,
}
_WAITING = {"status": "waiting", "started": None, "tiles": 0, "tiles_done": 0}
_WAITING |= {"tiles_per_second": None, "seconds_left": None, "attempts": 0}
JOBS: Responses = {200: document(JobList, {"jobs": [_JOB_EXAMPLE]}, description="The last jobs.")}
JOB: Responses = {200: document(Job, _JOB_EXAMPLE, description="The job.")}
NEW_JOB: Responses = {
    **JOB,
    201: document(Job, _JOB_EXAMPLE | _WAITING, description="A new job."),
}

_OF_SLIDES: Responses = {
    400: error(
        "The slide cannot be read, or an option cannot be used.",
        SlideFormatError.code,
        "case-7.svs is not a slide or image that can be read: it is damaged",
    ),
    404: error(
        "There is no such slide, tile, result or job.",
        NotFoundError.code,
        "There is no slide '0f2d'. GET /slides lists all.",
    ),
}


def with_errors(answers: Responses, *statuses: int) -> Responses:
    """Answers together with the errors of some statuses; 500 always may be."""
    known: Responses = {**UPLOAD_ERRORS, **_OF_SLIDES}
    errors: Responses = {status: known[status] for status in statuses}
    return {**answers, **errors, 500: ERRORS[500]}
