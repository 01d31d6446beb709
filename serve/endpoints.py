"""The endpoints of the HTTP service, one Starlette application; `serve.service` runs it.

    POST /segment   multipart field `image`; JSON: the `Summary`
    POST /labels    the same; PNG, indexed, pixel values are the labels
    POST /overlay   the same; PNG, the image with the classes' colours over it
    POST /arrays    the same; npz: `labels`, `confidence` (H x W uint8), `summary` (JSON as bytes)
    GET  /model     JSON: the manifest
    GET  /          JSON: this list

Errors are JSON, {"error": message}: 400 for an image that cannot be used, 413 for one that is too
large, 503 while the model is not available.
"""

import asyncio
import io
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import FocalPathError, ImageError, ImageTooLargeError
from serve.images import decode_image
from serve.manifest import Manifest, read_bundle
from serve.outputs import label_png, overlay_png
from serve.segmenter import Segmentation, Segmenter, open_segmenter
from serve.settings import MEBIBYTE, ServeSettings

_log = logging.getLogger("bentoml.focalpath")
_FORM_OVERHEAD_BYTES = MEBIBYTE
"""What a multipart body may have around the image."""
_MAX_FORM_FIELDS = 8
_EXPECTED_FORM = (
    "Send multipart/form-data with a file in the field 'image', as `curl -F image=@tile.png` does."
)

Render = Callable[[NDArray[np.uint8], Segmentation, Segmenter], Response]


class Model:
    """The segmenter, opened behind the running service, and again after it could not be opened."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._opening = threading.Lock()
        self._manifest: Manifest | None = None
        self._segmenter: Segmenter | None = None

    def manifest(self) -> Manifest:
        """The bundle's manifest; needs no backend.

        Raises:
            BundleError: the bundle is missing or damaged.
        """
        with self._opening:
            return self._read_manifest()

    def get(self) -> Segmenter:
        """The open segmenter; waits while it is being opened.

        Raises:
            FocalPathError: it cannot be opened now.
        """
        with self._opening:
            if self._segmenter is None:
                self._segmenter = open_segmenter(self._settings, self._read_manifest())
            return self._segmenter

    def is_ready(self) -> bool:
        """Whether a request would be answered now; tries to open what is not open."""
        if self._opening.locked():
            return False
        try:
            return self.get().is_ready()
        except FocalPathError as error:
            _log.warning("not ready: %s", error)
            return False

    def open_in_background(self) -> None:
        """Start to open the segmenter without waiting for it."""
        threading.Thread(target=self.is_ready, daemon=True).start()

    def _read_manifest(self) -> Manifest:
        if self._manifest is None:  # checks the files' SHA-256, so once only
            self._manifest = read_bundle(self._settings.bundle)
        return self._manifest


class BodyLimit:
    """ASGI middleware that refuses a body over the limit, by its header and by its actual bytes."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on while it is within the limit."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise self._refusal()
            return message

        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            refusal = self._refusal()
            await _error(refusal.detail, refusal.status_code)(scope, receive, send)
            return
        await self._app(scope, counted, send)

    def _refusal(self) -> HTTPException:
        limit = (self._max_bytes - _FORM_OVERHEAD_BYTES) / MEBIBYTE
        return HTTPException(
            413,
            f"The upload is larger than the {limit:g} MiB that are accepted. "
            "Crop the image or compress it.",
        )


def _error(message: str, status: int) -> JSONResponse:
    return JSONResponse({"error": message}, status)


async def _answer_focalpath_error(_: Request, error: Exception) -> Response:
    match error:
        case ImageTooLargeError():
            status = 413
        case ImageError():
            status = 400
        case _:
            status = 503
    return _error(str(error), status)


async def _answer_http_exception(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _error(error.detail, error.status_code)
    response.headers.update(error.headers or {})
    return response


async def _answer_disconnect(_: Request, __: Exception) -> Response:
    return _error("The request ended before its body did.", 400)  # nobody is left to read it


async def _read_form(request: Request) -> FormData:
    kind = request.headers.get("content-type", "nothing")
    if kind.partition(";")[0].strip().lower() != "multipart/form-data":
        raise ImageError(f"The content type is {kind}. {_EXPECTED_FORM}")
    try:
        return await request.form(max_files=1, max_fields=_MAX_FORM_FIELDS)
    except HTTPException as error:
        if error.status_code != 400:
            raise  # the body is over the limit
        raise ImageError(f"The form cannot be read: {error.detail} {_EXPECTED_FORM}") from error


async def _read_upload(request: Request) -> bytes:
    form = await _read_form(request)
    try:
        upload = form.get("image")
        if isinstance(upload, UploadFile):
            return await upload.read()
        found = ", ".join(repr(name) for name in form if name != "image") or "no field"
        found = "text in the field 'image'" if upload is not None else found
        raise ImageError(f"The form has {found}. {_EXPECTED_FORM}")
    finally:
        await form.close()


def _endpoint(render: Render) -> Callable[[Request], object]:
    """An endpoint that segments the upload and renders the answer, off the event loop."""

    async def endpoint(request: Request) -> Response:
        data = await _read_upload(request)
        state = request.app.state

        def work() -> Response:
            settings: ServeSettings = state.settings
            image = decode_image(
                data,
                max_bytes=settings.max_upload_bytes,
                max_pixels=settings.max_image_pixels,
            )
            segmenter = state.model.get()
            return render(image, segmenter.segment(image), segmenter)

        return await asyncio.get_running_loop().run_in_executor(state.pool, work)

    return endpoint


def _render_summary(_: NDArray[np.uint8], result: Segmentation, __: Segmenter) -> Response:
    return Response(result.summary.model_dump_json(), media_type="application/json")


def _render_labels(_: NDArray[np.uint8], result: Segmentation, segmenter: Segmenter) -> Response:
    return Response(label_png(result.labels, segmenter.manifest), media_type="image/png")


def _render_overlay(
    image: NDArray[np.uint8], result: Segmentation, segmenter: Segmenter
) -> Response:
    picture = overlay_png(image, result.labels, segmenter.manifest)
    return Response(picture, media_type="image/png")


def _render_arrays(_: NDArray[np.uint8], result: Segmentation, __: Segmenter) -> Response:
    buffer = io.BytesIO()
    summary = np.frombuffer(result.summary.model_dump_json().encode(), np.uint8)
    np.savez(buffer, labels=result.labels, confidence=result.confidence, summary=summary)
    return Response(buffer.getvalue(), media_type="application/x-npz")


async def _model(request: Request) -> Response:
    state = request.app.state
    manifest = await asyncio.get_running_loop().run_in_executor(state.pool, state.model.manifest)
    return Response(manifest.model_dump_json(), media_type="application/json")


async def _index(request: Request) -> Response:
    endpoints = [
        f"{method} {route.path}"
        for route in request.app.routes
        for method in sorted(route.methods - {"HEAD"})
    ]
    return JSONResponse({"service": "focalpath", "endpoints": endpoints})


def build_app(settings: ServeSettings) -> Starlette:
    """The endpoints, with the state that they share."""
    app = Starlette(
        routes=[
            Route("/segment", _endpoint(_render_summary), methods=["POST"]),
            Route("/labels", _endpoint(_render_labels), methods=["POST"]),
            Route("/overlay", _endpoint(_render_overlay), methods=["POST"]),
            Route("/arrays", _endpoint(_render_arrays), methods=["POST"]),
            Route("/model", _model, methods=["GET"]),
            Route("/", _index, methods=["GET"]),
        ],
        middleware=[
            Middleware(BodyLimit, max_bytes=settings.max_upload_bytes + _FORM_OVERHEAD_BYTES)
        ],
        exception_handlers={
            FocalPathError: _answer_focalpath_error,
            HTTPException: _answer_http_exception,
            ClientDisconnect: _answer_disconnect,
        },
    )
    app.state.settings = settings
    app.state.model = Model(settings)
    app.state.pool = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="segment")
    return app
