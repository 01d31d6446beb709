"""The endpoints of the HTTP service, one FastAPI application; `serve.service.server` runs it.

    POST /segment, /labels, ...  one image in one of the formats of `serve.answers.registry`
    POST /image                  the image alone as a PNG, for browsers that cannot show a TIFF
    POST /batch                  several images: NDJSON, one line per file as it is done
    GET  /model                  the manifest, as JSON
    GET  /runtime                what the model runs on and why, as JSON
    GET  /slides, /jobs          whole slides, with --slides: see `serve.service.slides.routes`
    GET  /metrics                for Prometheus
    GET  /openapi.json           all this as OpenAPI, with every option and its bounds
    GET  /                       the page, or for programs a list of endpoints and formats

Every POST takes multipart/form-data with one file in the field `image` (PNG, JPEG, TIFF or WebP),
/batch several files or zips in `images`. The um per pixel are `mpp`, in the query or as a text
field. All answers are in the pixels of the image as it was sent, upright; polygons are in its
slide's where `origin` and `downsample`, or the file's name, say where that is.

With the header `X-Keep-Result: yes` a result is kept in memory for a while, and further requests of
the same file, um per pixel and model take it instead of running the model. So do all requests for
a file whose outlines have just been refused for too many corners: the corners are known only after
the model has run.

Errors are answered as `serve.service.error_answers` says. In /batch a file that cannot be used is a
line of the answer with its `status`, `error` and `code`. The gateway answers 401, 429 and 504, and
gives every answer its `X-Request-ID`.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import FormData, UploadFile
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response, StreamingResponse

from serve.answers.format import AnswerFormat
from serve.answers.registry import FORMATS, file_formats
from serve.contract.errors import FocalPathError
from serve.contract.manifest import Manifest
from serve.inference.backend import RunsOn
from serve.service.batch import answer_batch
from serve.service.batch_files import BatchFile, batch_files, check_name
from serve.service.error_answers import EXCEPTION_HANDLERS
from serve.service.kept import KEEP_HEADER
from serve.service.model import Model
from serve.service.openapi import (
    BATCH_BODY,
    ERRORS,
    IMAGE_BODY,
    KEY_ERRORS,
    MANIFEST,
    RUNTIME,
    UPLOAD_ERRORS,
    DescribedApp,
    Responses,
    Schemas,
    binary_answer,
    text_answer,
)
from serve.service.page import page_routes
from serve.service.queries import ImageQuery, batch_query, format_query
from serve.service.route import Route, add_routes
from serve.service.telemetry import Telemetry
from serve.service.uploads import BATCH_PATH, BodyLimit, Limit, read_form, read_mpp
from serve.service.worker import Job, Worker, answer_image
from serve.settings import MEBIBYTE, ServeSettings

Endpoint = Callable[..., Awaitable[Response]]


@dataclass(frozen=True)
class Upload:
    """The image of a request, not yet decoded."""

    data: bytes
    mpp: float | None
    """um per pixel that the request states."""
    name: str
    """The name of the file at the client."""


async def _read_upload(request: Request, query: ImageQuery) -> Upload:
    form = await read_form(request, "image")
    try:
        upload = form["image"]
        assert isinstance(upload, UploadFile)
        name = upload.filename or ""
        check_name(name)
        return Upload(await upload.read(), read_mpp(form, query.mpp), name)
    finally:
        await form.close()


def _format_route(entry: AnswerFormat, schemas: Schemas) -> Route:
    """The route that segments an image and answers in one format."""

    async def answer(request: Request, query: ImageQuery) -> Response:
        upload = await _read_upload(request, query)
        keep = request.headers.get(KEEP_HEADER, "no") != "no"
        job = Job(formats=(entry.name,), mpp=upload.mpp, options=dict(query), keep=keep)
        return await answer_image(request.app.state, upload.data, job, upload.name)

    answer.__doc__ = entry.description
    answers = schemas.answer(entry)
    return _upload_route(entry.path, answer, answers, format_query(entry), IMAGE_BODY)


def _upload_route(
    path: str,
    endpoint: Endpoint,
    answers: Responses,
    query: type[ImageQuery],
    body: dict[str, Any],
) -> Route:
    endpoint.__annotations__["query"] = Annotated[query, Query()]  # which FastAPI reads
    responses = {**answers, **UPLOAD_ERRORS}
    return Route("POST", path, endpoint, responses, query, body, name=path[1:])


async def _image(request: Request, query: ImageQuery) -> Response:
    """The decoded image, upright, as an RGB PNG: for browsers, which cannot show a TIFF."""
    worker: Worker = request.app.state.worker
    upload = await _read_upload(request, query)
    content = await worker.run(lambda: worker.picture(upload.data))
    return Response(content, media_type="image/png")


async def _batch(request: Request, query: Any) -> Response:
    """Several images, or zips of them: one line of JSON per image, a `BatchLine`, in their order.

    A file that cannot be used gets a line with its error; the others are answered.
    """
    state = request.app.state
    settings: ServeSettings = state.settings
    form = await read_form(request, "images", max_files=settings.max_batch_files)
    try:
        job = Job(
            formats=tuple(dict.fromkeys(query.outputs)),
            mpp=read_mpp(form, query.mpp),
            options=dict(query),
        )
        files = await state.worker.look(lambda: _batch_files(form, settings))
    except FocalPathError:
        await form.close()
        raise
    lines = answer_batch(files, form, job, state.worker, state.model)
    return StreamingResponse(lines, media_type="application/x-ndjson")


def _batch_files(form: FormData, settings: ServeSettings) -> list[BatchFile]:
    uploads = [upload for upload in form.getlist("images") if isinstance(upload, UploadFile)]
    return batch_files(
        uploads,
        max_bytes=settings.max_upload_bytes,
        max_files=settings.max_batch_files,
        max_unpacked_bytes=settings.max_batch_mib * MEBIBYTE,
    )


async def _model(request: Request) -> Response:
    """The manifest of the model that answers: classes, colours, um per pixel, files."""
    state = request.app.state
    manifest: Manifest = await state.worker.look(state.model.manifest)
    return Response(manifest.model_dump_json(), media_type="application/json")


async def _runtime(request: Request) -> Response:
    """What the model runs on, and why: provider, precision, processor."""
    state = request.app.state
    runs_on: RunsOn = await state.worker.look(state.model.runs_on)
    return Response(runs_on.model_dump_json(), media_type="application/json")


def _metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(request.app.state.telemetry.render(), media_type=CONTENT_TYPE_LATEST)


async def _index(request: Request) -> Response:
    """List the endpoints and formats, for programs and for the page's downloads."""
    endpoints = [
        f"{method} {route.path}"
        for route in request.app.routes
        for method in sorted(route.methods - {"HEAD"})
    ]
    formats = [
        {
            "name": entry.name,
            "title": entry.title,
            "kind": entry.kind,
            "path": entry.path,
            "suffix": entry.suffix,
            "options": list(entry.options.model_fields),
        }
        for entry in file_formats()
    ]
    index = {"service": "focalpath", "endpoints": endpoints, "formats": formats}
    if request.app.state.slides is not None:
        index["slide_formats"] = request.app.state.slides.formats
    return JSONResponse(index)


def build_app(settings: ServeSettings) -> FastAPI:
    """The endpoints, with the state that they share."""
    telemetry = Telemetry()
    app = DescribedApp(
        title="FocalPath",
        version="1",
        description="Segmentation of histopathology images. For research use only.",
        servers=[{"url": settings.root_path}] if settings.root_path else None,
        docs_url=None,  # they load scripts from another host
        redoc_url=None,
        redirect_slashes=False,
        # `serve.service.gateway` has its own.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        dependencies=_key_headers(settings),
        middleware=[
            Middleware(
                BodyLimit,
                image=Limit(settings.max_upload_mib, "Crop the image or compress it."),
                batch=Limit(settings.max_batch_mib, "Send it in parts."),
            )
        ],
        exception_handlers=EXCEPTION_HANDLERS,
    )
    key_errors = KEY_ERRORS if settings.api_keys_file else {}
    _add_routes(app, key_errors)
    app.state.slides = None
    if settings.slides is not None:  # whose libraries are an extra
        from serve.service.slides.job_routes import job_routes
        from serve.service.slides.routes import slide_routes
        from serve.service.slides.state import Slides

        add_routes(app, (*slide_routes(), *job_routes()), key_errors)
        app.state.slides = Slides.of(settings, telemetry)
    app.router.routes.extend(page_routes(_index))
    app.state.settings = settings
    app.state.telemetry = telemetry
    app.state.model = Model(settings, telemetry)
    app.state.worker = Worker(settings, telemetry)
    return app


def _add_routes(app: FastAPI, key_errors: Responses) -> None:
    schemas = Schemas()
    picture = binary_answer("image/png")
    routes = (
        *(_format_route(entry, schemas) for entry in FORMATS.values()),
        _upload_route("/image", _image, picture, ImageQuery, IMAGE_BODY),
        _upload_route(BATCH_PATH, _batch, schemas.lines(), batch_query(), BATCH_BODY),
    )
    add_routes(app, routes, key_errors)
    responses = {**MANIFEST, **ERRORS, **key_errors}
    app.get("/model", response_class=Response, responses=responses)(_model)
    responses = {**RUNTIME, **ERRORS, **key_errors}
    app.get("/runtime", response_class=Response, responses=responses)(_runtime)
    metrics = text_answer("text/plain", 'focalpath_class_pixels_total{class="Tumor"} 262144.0\n')
    app.get("/metrics", response_class=Response, responses=metrics)(_metrics)


def _key_headers(settings: ServeSettings) -> list[Any]:
    """Declare the key for the OpenAPI document; `serve.service.access` checks it."""
    if settings.api_keys_file is None:
        return []
    return [
        Security(HTTPBearer(auto_error=False)),
        Security(APIKeyHeader(name="X-API-Key", auto_error=False)),
    ]
