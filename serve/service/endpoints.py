"""The endpoints of the HTTP service, one FastAPI application; `serve.service.server` runs it.

Every POST takes multipart/form-data with one file in the field `image` (PNG, JPEG, TIFF or WebP),
or /batch several in `images`, and the um per pixel as `mpp`, in the query or as a text field; all
answers are in the pixels of the image as sent, upright.

    POST /segment        JSON: the `Summary`: image, mpp and its source, numbers per class
    POST /labels         PNG, indexed, pixel values are the labels, the palette the colours
    POST /confidence     PNG, grey, probability of the label, 255 = 1.0
    POST /overlay        PNG, the image under the classes' colours; query: `alpha` 0 to 1,
                         `classes` (repeat it) to show only these
    POST /image          PNG, the image alone, for browsers that cannot show a TIFF
    POST /geojson        QuPath's GeoJSON; query: `classes`, `simplify_px`, `min_area_px`
    POST /dsa            an annotation document of the Digital Slide Archive; the same query
    POST /probabilities  npz: `probabilities` (C x h x w uint8), `origin_px`, `stride_px`, ...
    POST /arrays         npz: `labels`, `confidence` (H x W uint8), `summary` (JSON as bytes);
                         with `probabilities=true` also what /probabilities has
    POST /batch          several files in the field `images`, or zips of files: NDJSON, one line
                         a file as it is done; query: `outputs` (repeat it) out of `json` (the
                         `Summary`), `labels`, `confidence`, `overlay`, `geojson`, `dsa`
    GET  /model          JSON: the manifest
    GET  /metrics        for Prometheus
    GET  /openapi.json   all this as OpenAPI
    GET  /               the page, or JSON: this list

Errors are JSON, {"error": message}: 400 for a form, an image or an option that cannot be used, 401
without a key where keys are set, 404 and 405 for what is not here, 408 for an upload that stops
arriving, 413 for what is too large, 429 with `Retry-After` when too many wait, 500 where the
service itself fails, 503 while the model is not available, 504 for what takes too long. In /batch a
file that cannot be used is a line of the answer with its `status` and `error`. The
gateway answers 401, 429 and 504, and gives every answer its `X-Request-ID`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import UploadFile
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response, StreamingResponse

from serve.answers.formats import MEDIA_TYPES, Form, RenderOptions
from serve.contract.errors import FocalPathError
from serve.contract.manifest import Manifest
from serve.inference.summary import Summary
from serve.service.batch import answer_batch
from serve.service.error_answers import EXCEPTION_HANDLERS
from serve.service.model import Model
from serve.service.openapi import (
    BATCH_BODY,
    ERRORS,
    IMAGE_BODY,
    KEY_ERRORS,
    LINES,
    MANIFEST,
    UPLOAD_ERRORS,
    Alpha,
    Classes,
    DescribedApp,
    MinAreaPx,
    Mpp,
    Outputs,
    Responses,
    SimplifyPx,
    WithProbabilities,
    binary_answer,
    json_answer,
    text_answer,
)
from serve.service.page import page_routes
from serve.service.telemetry import Telemetry
from serve.service.uploads import (
    BATCH_PATH,
    BodyLimit,
    Limit,
    batch_files,
    check_name,
    read_form,
    read_mpp,
)
from serve.service.worker import Job, Worker
from serve.settings import MEBIBYTE, ServeSettings


@dataclass(frozen=True)
class Upload:
    """A request's image, not decoded yet."""

    data: bytes
    mpp: float | None


async def _read_upload(request: Request, mpp: Mpp = None) -> Upload:
    form = await read_form(request, "image")
    try:
        upload = form["image"]
        assert isinstance(upload, UploadFile)
        check_name(upload.filename or "")
        return Upload(await upload.read(), read_mpp(form, mpp))
    finally:
        await form.close()


Uploaded = Annotated[Upload, Depends(_read_upload)]


async def _answer(request: Request, upload: Upload, form: Form, options: RenderOptions) -> Response:
    """Segment the upload and answer with one form of it."""
    state = request.app.state
    worker: Worker = state.worker
    job = Job(forms=(form,), mpp=upload.mpp, options=options)
    (content,) = await worker.run(lambda: worker.answer(state.model, upload.data, job))
    return Response(content, media_type=MEDIA_TYPES[form])


async def _segment(request: Request, upload: Uploaded) -> Response:
    """Numbers per class: share of the pixels, area, confidence, predicted IoU."""
    return await _answer(request, upload, "json", RenderOptions())


async def _labels(request: Request, upload: Uploaded) -> Response:
    """An indexed PNG whose pixel values are the labels and whose palette is the colours."""
    return await _answer(request, upload, "labels", RenderOptions())


async def _confidence(request: Request, upload: Uploaded) -> Response:
    """A grey PNG of the probability of each pixel's label, 255 = 1.0."""
    return await _answer(request, upload, "confidence", RenderOptions())


async def _overlay(
    request: Request, upload: Uploaded, classes: Classes, alpha: Alpha = 0.5
) -> Response:
    """The image with the classes' colours over it, as a PNG."""
    options = RenderOptions(alpha=alpha, classes=classes)
    return await _answer(request, upload, "overlay", options)


async def _image(request: Request, upload: Uploaded) -> Response:
    """The image as it is read, upright, as an RGB PNG; browsers cannot show a TIFF."""
    worker: Worker = request.app.state.worker
    content = await worker.run(lambda: worker.picture(upload.data))
    return Response(content, media_type="image/png")


async def _geojson(
    request: Request,
    upload: Uploaded,
    classes: Classes,
    simplify_px: SimplifyPx = 0.0,
    min_area_px: MinAreaPx = 0,
) -> Response:
    """Regions as QuPath's annotations: polygons with holes, classes, colours and measurements."""
    options = RenderOptions(classes=classes, simplify_px=simplify_px, min_area_px=min_area_px)
    return await _answer(request, upload, "geojson", options)


async def _dsa(
    request: Request,
    upload: Uploaded,
    classes: Classes,
    simplify_px: SimplifyPx = 0.0,
    min_area_px: MinAreaPx = 0,
) -> Response:
    """Regions as an annotation document of the Digital Slide Archive."""
    options = RenderOptions(classes=classes, simplify_px=simplify_px, min_area_px=min_area_px)
    return await _answer(request, upload, "dsa", options)


async def _probabilities(request: Request, upload: Uploaded) -> Response:
    """An npz of all classes' probabilities at the decoder's resolution, and where its cells are."""
    return await _answer(request, upload, "probabilities", RenderOptions())


async def _arrays(
    request: Request, upload: Uploaded, probabilities: WithProbabilities = False
) -> Response:
    """An npz of `labels`, `confidence` and `summary`, for programs."""
    return await _answer(request, upload, "arrays", RenderOptions(with_probabilities=probabilities))


async def _batch(
    request: Request,
    classes: Classes,
    outputs: Outputs,
    mpp: Mpp = None,
    alpha: Alpha = 0.5,
    simplify_px: SimplifyPx = 0.0,
    min_area_px: MinAreaPx = 0,
) -> Response:
    """Several images, or zips of them: a line of JSON for each, a `BatchLine`, in their order.

    A file that cannot be used gets a line that says so; the others are answered all the same.
    """
    state = request.app.state
    settings: ServeSettings = state.settings
    form = await read_form(request, "images", max_files=settings.max_batch_files)
    options = RenderOptions(
        alpha=alpha, classes=classes, simplify_px=simplify_px, min_area_px=min_area_px
    )
    try:
        job = Job(
            forms=tuple(dict.fromkeys(outputs)),
            mpp=read_mpp(form, mpp),
            options=options,
        )
        uploads = [upload for upload in form.getlist("images") if isinstance(upload, UploadFile)]
        files = await state.worker.run(
            lambda: batch_files(
                uploads,
                max_bytes=settings.max_upload_bytes,
                max_files=settings.max_batch_files,
                max_unpacked_bytes=settings.max_batch_mib * MEBIBYTE,
            )
        )
    except FocalPathError:
        await form.close()
        raise
    lines = answer_batch(files, form, job, state.worker, state.model, ahead=settings.concurrency)
    return StreamingResponse(lines, media_type="application/x-ndjson")


async def _model(request: Request) -> Response:
    """The manifest of the model that answers: classes, colours, um per pixel, files."""
    state = request.app.state
    manifest: Manifest = await state.worker.run(state.model.manifest)
    return Response(manifest.model_dump_json(), media_type="application/json")


def _metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(request.app.state.telemetry.render(), media_type=CONTENT_TYPE_LATEST)


async def _index(request: Request) -> Response:
    endpoints = [
        f"{method} {route.path}"
        for route in request.app.routes
        for method in sorted(route.methods - {"HEAD"})
    ]
    return JSONResponse({"service": "focalpath", "endpoints": endpoints})


_IMAGE_ENDPOINTS: tuple[tuple[str, Callable[..., Any], Responses], ...] = (
    ("/segment", _segment, {200: {"model": Summary}}),
    ("/labels", _labels, binary_answer("image/png")),
    ("/confidence", _confidence, binary_answer("image/png")),
    ("/overlay", _overlay, binary_answer("image/png")),
    ("/image", _image, binary_answer("image/png")),
    ("/geojson", _geojson, json_answer(MEDIA_TYPES["geojson"], "FeatureCollection")),
    ("/dsa", _dsa, json_answer(MEDIA_TYPES["dsa"], "AnnotationDocument")),
    (
        "/probabilities",
        _probabilities,
        binary_answer(
            "application/x-npz",
            "NumPy's npz of `probabilities` (C x h x w uint8, 255 = 1.0), `classes` (their names), "
            "`origin_px` and `stride_px` (y, x): cell (i, j) is of the pixels from "
            "origin_px + (i, j) * stride_px to one stride further",
        ),
    ),
    (
        "/arrays",
        _arrays,
        binary_answer(
            "application/x-npz",
            "NumPy's npz of `labels` and `confidence` (H x W uint8) and `summary` (the JSON of "
            "/segment as bytes)",
        ),
    ),
)


def build_app(settings: ServeSettings) -> FastAPI:
    """The endpoints, with the state that they share."""
    app = DescribedApp(
        title="FocalPath",
        version="1",
        description="Segmentation of histopathology images. For research use only.",
        docs_url=None,  # they load scripts from another host
        redoc_url=None,
        redirect_slashes=False,
        telemetry={
            "tracing": False,
            "metrics": False,
            "logs": False,
        },  # `serve.service.gateway` has it
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
    _add_routes(app, KEY_ERRORS if settings.api_keys_file else {})
    app.state.settings = settings
    app.state.telemetry = Telemetry()
    app.state.model = Model(settings, app.state.telemetry)
    app.state.worker = Worker(settings, app.state.telemetry)
    return app


def _add_routes(app: FastAPI, key_errors: Responses) -> None:
    for path, endpoint, responses in _IMAGE_ENDPOINTS:
        app.post(
            path,
            name=path[1:],
            response_class=Response,
            responses={**responses, **UPLOAD_ERRORS, **key_errors},
            openapi_extra=IMAGE_BODY,
        )(endpoint)
    app.post(
        BATCH_PATH,
        name="batch",
        response_class=Response,
        responses={**LINES, **UPLOAD_ERRORS, **key_errors},
        openapi_extra=BATCH_BODY,
    )(_batch)
    responses = {**MANIFEST, **ERRORS, **key_errors}
    app.get("/model", response_class=Response, responses=responses)(_model)
    metrics = text_answer("text/plain", 'focalpath_class_pixels_total{class="Tumor"} 262144.0\n')
    app.get("/metrics", response_class=Response, responses=metrics)(_metrics)
    app.router.routes.extend(page_routes(_index))


def _key_headers(settings: ServeSettings) -> list[Any]:
    """For the OpenAPI document only: `serve.service.access` checks the key before."""
    if settings.api_keys_file is None:
        return []
    return [
        Security(HTTPBearer(auto_error=False)),
        Security(APIKeyHeader(name="X-API-Key", auto_error=False)),
    ]
