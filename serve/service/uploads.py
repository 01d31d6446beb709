"""Uploads: multipart forms, read strictly and within limits, and zips of images.

The service opens nothing that a client names. It only repeats a file's name in the answer, and
refuses an address in a field.
"""

import asyncio
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.contract.errors import (
    FocalPathError,
    FormError,
    ImageError,
    ImageTooLargeError,
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
_ZIP_START = b"PK"
_ZIP_ENTRY_BYTES = 4096
"""Bytes of a zip's directory per file of a batch. Bounds the memory for reading it."""
_ZIP_DIRECTORY_SIZE = 5
"""Where the directory's size is in what zipfile reads at a zip's end."""
_IMAGE_SPOOLED_ABOVE_BYTES = MEBIBYTE
"""An image above this is kept on disk until it is there: many may arrive at the same time."""
_SPOOLED_ABOVE_BYTES = 64 * 1024
"""Files of a batch above this are kept on disk until they are read."""
_CLUTTER = frozenset({"__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini"})
"""Names that Finder and Explorer leave in folders, and so in zips of them."""
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,  # a compression that Python lacks
    RuntimeError,  # a password
    OSError,
    EOFError,
    ValueError,
    LookupError,
)
"""What zipfile raises on broken or unusual archives."""
_PATH_TRICK = re.compile(r"(^|/)\.\.(/|$)|^/|\\|[\x00-\x1f\x7f]")
_DRIVE = re.compile(r"[A-Za-z]:")


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
                raise self._too_slow() from None
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

    def _too_slow(self) -> UploadTooSlowError:
        return UploadTooSlowError(
            f"No more of the upload has arrived for {self._max_pause_s:g} s. Send it again."
        )


class _MemoryParser(MultiPartParser):
    """Keeps a small image in memory, where it is needed at once: a write to disk takes a thread."""

    spool_max_size = _IMAGE_SPOOLED_ABOVE_BYTES


class _DiskParser(MultiPartParser):
    """Keeps the files of a batch on disk: it is larger than what may be in memory."""

    spool_max_size = _SPOOLED_ABOVE_BYTES


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
    kind_of_parser = _MemoryParser if max_files == 1 else _DiskParser
    parser = kind_of_parser(
        request.headers, request.stream(), max_files=max_files, max_fields=_MAX_FORM_FIELDS
    )
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


@dataclass(frozen=True)
class BatchFile:
    """One file of a batch."""

    name: str
    read: Callable[[], bytes]
    """Returns its content; raises a FocalPathError if the file cannot be used."""


def batch_files(
    uploads: list[UploadFile], *, max_bytes: int, max_files: int, max_unpacked_bytes: int
) -> list[BatchFile]:
    """List the files of a batch, including those in zips, without reading them.

    A file that cannot be used is in the list too: reading it raises its error.

    Args:
        uploads: the form's files.
        max_bytes: the largest file, in bytes.
        max_files: most files, including those in zips.
        max_unpacked_bytes: the largest size of all files in zips together, in bytes.

    Raises:
        ImageTooLargeError: there are too many files, or the zips expand to too many bytes.
    """
    files: list[BatchFile] = []
    expanded = 0
    for upload in uploads:
        name = upload.filename or ""
        start = upload.file.read(len(_ZIP_START))
        upload.file.seek(0)
        if start != _ZIP_START:
            files.append(_checked(name, _reader(upload.file, max_bytes)))
            continue
        try:
            _check_directory(upload.file, max_files)
            archive = zipfile.ZipFile(upload.file)
            members = _members(archive)
        except ImageTooLargeError:
            raise
        except _ZIP_ERRORS as error:
            damaged = ImageError(f"The zip is damaged: {error}.", code="zip_damaged")
            files.append(BatchFile(name, _failing(damaged)))
            continue
        if not members:
            empty = ImageError("The zip has no file in it. Zip the images.", code="zip_empty")
            files.append(BatchFile(name, _failing(empty)))
        expanded += sum(info.file_size for _, info in members)
        files += [
            _checked(member, _member_reader(archive, info, max_bytes)) for member, info in members
        ]
    if len(files) > max_files:
        raise ImageTooLargeError(
            f"The batch has {len(files)} files, at most {max_files} are accepted. Send it in "
            "parts.",
            code="too_many_files",
        )
    if expanded > max_unpacked_bytes:
        raise ImageTooLargeError(
            f"The zips expand to {expanded} bytes, at most {max_unpacked_bytes} are accepted. "
            "Send them in parts.",
            code="zip_too_large",
        )
    return files


def _check_directory(file: IO[bytes], max_files: int) -> None:
    """Refuse a zip whose list of files is too long, before zipfile reads the list.

    Raises:
        ImageTooLargeError: its directory is too large.
    """
    # Read as zipfile reads it, so that both see the same size.
    end: list[Any] | None = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    size, limit = end[_ZIP_DIRECTORY_SIZE] if end else 0, max_files * _ZIP_ENTRY_BYTES
    if size > limit:
        raise ImageTooLargeError(
            f"The zip's list of files has {size} bytes, at most {limit} are accepted. Send the "
            "files in parts.",
            code="zip_too_large",
        )


def _members(archive: zipfile.ZipFile) -> list[tuple[str, zipfile.ZipInfo]]:
    """List the files of a zip, by their names with slashes; without folders and clutter.

    Some programs on Windows (such as PowerShell 5) write backslashes between folders, against the
    zip format. Python reads those as part of the name, unless it runs on Windows itself.
    """
    named = [(info.filename.replace("\\", "/"), info) for info in archive.infolist()]
    return [
        (name, info)
        for name, info in named
        if not name.endswith("/") and _CLUTTER.isdisjoint(name.split("/"))
    ]


def check_name(name: str) -> None:
    """Raise ImageError for a name that leads out of its folder.

    The service opens no name, but a client may write a batch's answers to files of these names.
    """
    if _DRIVE.match(name):
        raise ImageError(
            f"The name {name!r} starts with a drive of Windows. Send the file under a name without "
            "'X:' at its start.",
            code="name_unsafe",
        )
    if _PATH_TRICK.search(name):
        raise ImageError(
            f"The name {name!r} leads out of its folder. Rename the file.", code="name_unsafe"
        )


def _checked(name: str, read: Callable[[], bytes]) -> BatchFile:
    try:
        check_name(name)
    except ImageError as error:
        read = _failing(error)
    return BatchFile(name, read)


def _failing(error: FocalPathError) -> Callable[[], bytes]:
    def read() -> bytes:
        raise error

    return read


def _reader(file: IO[bytes], max_bytes: int) -> Callable[[], bytes]:
    return lambda: file.read(max_bytes + 1)  # one more, so that decoding refuses it


def _member_reader(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, max_bytes: int
) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            with archive.open(info) as member:
                return member.read(max_bytes + 1)  # its header may lie about the size
        except _ZIP_ERRORS as error:
            raise ImageError(
                f"The file cannot be unpacked: {error}. Zip it again.", code="zip_damaged"
            ) from error

    return read
