"""Uploads: multipart forms, read strictly and within limits. An address in a field is refused."""

import asyncio
from dataclasses import dataclass

from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.contract.errors import (
    FormError,
    OptionError,
    UploadTooLargeError,
    UploadTooSlowError,
)
from serve.images.mpp import check_mpp
from serve.service.error_answers import error_answer
from serve.settings import MEBIBYTE

BATCH_PATH = "/batch"
_FORM_OVERHEAD_BYTES = MEBIBYTE
"""Bytes that a multipart body may have besides its files."""
MAX_PAUSE_S = 30.0
"""Seconds that a body may keep the service waiting for its next part."""
_MAX_FORM_FIELDS = 8
_IMAGE_SPOOLED_ABOVE_BYTES = 4 * MEBIBYTE
"""An image above this is kept on disk until it is there: many may arrive at the same time. A PNG of
1024 x 1024 px, of about 2 MiB, stays in memory: a write to disk takes a thread."""
_SPOOLED_ABOVE_BYTES = 64 * 1024
"""Files of a batch above this are kept on disk until they are read."""


@dataclass(frozen=True)
class Limit:
    """The largest upload of an endpoint."""

    mib: int
    advice: str
    """What to do with a larger one."""

    @property
    def max_bytes(self) -> int:
        """Of the whole body."""
        return self.mib * MEBIBYTE + _FORM_OVERHEAD_BYTES

    def refusal(self) -> UploadTooLargeError:
        """The error of a larger one."""
        return UploadTooLargeError(
            f"The upload is larger than the {self.mib} MiB that are accepted. {self.advice}"
        )


class BodyLimit:
    """ASGI middleware that refuses a body over the limit, by its header and by its actual bytes.

    It also refuses a body that stops arriving, which would keep its place among the uploads.

    Args:
        app: the application behind it.
        image: the limit of an upload.
        batch: the limit of an upload to `BATCH_PATH`.
        max_pause_s: how long a body may stop.
    """

    def __init__(
        self, app: ASGIApp, image: Limit, batch: Limit, max_pause_s: float = MAX_PAUSE_S
    ) -> None:
        self._app = app
        self._image = image
        self._batch = batch
        self._max_pause_s = max_pause_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on while it is within the limit."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._batch if scope["path"] == BATCH_PATH else self._image
        received = 0
        is_complete = False

        async def counted() -> Message:
            nonlocal received, is_complete
            try:
                async with asyncio.timeout(None if is_complete else self._max_pause_s):
                    message = await receive()
            except TimeoutError:
                raise UploadTooSlowError(
                    f"No more of the upload has arrived for {self._max_pause_s:g} s. Send it again."
                ) from None
            is_complete = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > limit.max_bytes:
                raise limit.refusal()
            return message

        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit.max_bytes:
            await error_answer(limit.refusal())(scope, receive, send)
            return
        await self._app(scope, counted, send)


async def read_form(request: Request, field: str, *, max_files: int = 1) -> FormData:
    """Read a multipart form; close it when its files have been read.

    Raises:
        FormError: the body is not such a form, has no file in `field`, or has unknown fields.
        UploadTooLargeError: the body is over the limit.
        UploadTooSlowError: the body stops arriving.
    """
    expected = (
        f"Send multipart/form-data with a file in the field '{field}', as "
        f"`curl -F {field}=@tile.png` does."
    )
    kind = request.headers.get("content-type", "nothing")
    if kind.partition(";")[0].strip().lower() != "multipart/form-data":
        raise FormError(f"The content type is {kind}. {expected}")
    parser = MultiPartParser(
        request.headers, request.stream(), max_files=max_files, max_fields=_MAX_FORM_FIELDS
    )
    parser.spool_max_size = _IMAGE_SPOOLED_ABOVE_BYTES if max_files == 1 else _SPOOLED_ABOVE_BYTES
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise FormError(f"The form cannot be read: {error.message} {expected}") from error
    unknown = ", ".join(repr(name) for name in dict.fromkeys(form) if name not in (field, "mpp"))
    if unknown or not any(isinstance(upload, UploadFile) for upload in form.getlist(field)):
        found = unknown or (f"text in the field '{field}'" if field in form else "no field")
        await form.close()
        raise FormError(f"The form has {found}. {expected}")
    return form


def read_mpp(form: FormData, in_query: float | None) -> float | None:
    """The um per pixel that the request states: in its query, or as a text field.

    Raises:
        OptionError: the field is not a number or out of range, or the request states two values.
    """
    texts = form.getlist("mpp")
    if not texts:
        return in_query
    text = texts[0]
    try:
        mpp = float(text) if isinstance(text, str) else float("nan")
    except ValueError:
        raise OptionError(f"mpp is {text!r}, expected a number of um per pixel.") from None
    check_mpp(mpp)
    stated = {*texts} if in_query is None or in_query == mpp else {*texts, f"{in_query:g}"}
    if len(stated) > 1:
        values = ", ".join(sorted(map(str, stated)))
        raise OptionError(f"mpp is stated more than once: {values}. State it once.")
    return mpp
