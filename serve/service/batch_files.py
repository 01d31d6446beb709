"""The files of a batch, those in zips included, listed without reading them.

The service opens nothing that a client names. It only repeats a file's name in the answer.
"""

import lzma
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

from starlette.datastructures import UploadFile

from serve.contract.errors import FocalPathError, ImageError, ImageTooLargeError

_ZIP_START = b"PK"
_ZIP_ENTRY_BYTES = 4096
"""Bytes of a zip's directory per file of a batch. Bounds the memory for reading it."""
_ZIP_DIRECTORY_SIZE = 5
"""Where the directory's size is in what zipfile reads at a zip's end."""
_CLUTTER = frozenset({"__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini"})
"""Names that Finder and Explorer leave in folders, and so in zips of them."""
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    lzma.LZMAError,
    zlib.error,
    NotImplementedError,  # a compression that Python lacks
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
)
"""What zipfile raises on broken or unusual archives."""
_ENCRYPTED = 1
"""Bit of a zip entry's flags."""
_PATH_TRICK = re.compile(r"(^|/)\.\.(/|$)|^/|\\|[\x00-\x1f\x7f]")
_DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True)
class BatchFile:
    """One file of a batch."""

    name: str
    content: Callable[[], bytes]
    """Reads it; may raise a FocalPathError."""

    def read(self) -> bytes:
        """Its content.

        Raises:
            FocalPathError: the file cannot be used.
        """
        check_name(self.name)
        return self.content()


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
            # One byte more, so that decoding refuses it.
            files.append(BatchFile(name, partial(upload.file.read, max_bytes + 1)))
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
            BatchFile(member, _member_reader(archive, info, max_bytes)) for member, info in members
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
            f"The name {name!r} leads out of its folder, or has characters that are no text. "
            "Rename the file.",
            code="name_unsafe",
        )


def _failing(error: FocalPathError) -> Callable[[], bytes]:
    def read() -> bytes:
        raise error

    return read


def _member_reader(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, max_bytes: int
) -> Callable[[], bytes]:
    def read() -> bytes:
        if info.flag_bits & _ENCRYPTED:
            raise ImageError(
                "The zip is protected by a password. Zip the images without one.",
                code="zip_damaged",
            )
        try:
            with archive.open(info) as member:
                return member.read(max_bytes + 1)  # its header may lie about the size
        except _ZIP_ERRORS as error:
            raise ImageError(
                f"The file cannot be unpacked: {error}. Zip it again.", code="zip_damaged"
            ) from error

    return read
