"""Writes files and folders whole or not at all, and explains where they cannot be written."""

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from train.errors import DestinationError, StorageError

CANNOT_WRITE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    errno.ENAMETOOLONG,
)
"""Errors of the operating system that the user can fix."""


def refuse_existing(folder: Path) -> None:
    """Refuse a place that holds something: a file, or a folder that is not empty.

    The current folder is refused, too: a new one takes its place, and whoever is in it is lost.

    Raises:
        DestinationError: it does.
    """
    if os.path.realpath(folder) == os.path.realpath(".") or (
        folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise DestinationError(
            f"{folder} exists; expected a new folder. Give another one, or delete this one first."
        )


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a new folder beside `folder` to fill. It becomes `folder` at the end.

    A link is followed, so that it may lead to another disk.

    On any failure it is removed, and `folder` stays as it was. Missing parents are created.

    Raises:
        StorageError: the disk is full or cannot be written, or `folder` holds something.
    """
    folder = Path(os.path.realpath(folder))
    partial = _beside(folder)
    with write_errors_explained(folder):
        try:
            partial.mkdir(parents=True)
            yield partial
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write. It replaces `path` at the end.

    On any failure it is removed, and `path` stays as it was. The file gets the mode that the umask
    gives, whatever the library that writes it sets: safetensors makes its files readable by their
    owner alone.

    Raises:
        StorageError: the disk is full, or cannot be written.
    """
    partial = _beside(path)
    with write_errors_explained(path):
        try:
            partial.touch()
            mode = stat.S_IMODE(partial.stat().st_mode)
            yield partial
            if stat.S_IMODE(partial.stat().st_mode) != mode:  # some network shares allow no change
                partial.chmod(mode)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def write_errors_explained(place: Path) -> Iterator[None]:
    """Turn a full disk, or one that cannot be written, into an error for the user.

    Raises:
        StorageError: `place` cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and not _can_be_fixed(error, place):
            raise
        raise StorageError(
            f"cannot write {place} ({error}). Expected a place that may be written, with room on "
            "the disk: free some, or give another place. What was written before is still whole."
        ) from error


def write_json(path: Path, content: object) -> None:
    """Write JSON that a person can read, whole or not at all.

    Raises:
        StorageError: the disk is full, or cannot be written.
    """
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def null_for_nan(content: Any) -> Any:
    """The same content with None for each NaN: JSON has no NaN, and other programs refuse it."""
    if isinstance(content, dict):
        return {key: null_for_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [null_for_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(..., object_pairs_hook=...)`: refuses a key that is there twice.

    Raises:
        ValueError: one is; JSON would take the later and say nothing.
    """
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} is there twice")
    return dict(pairs)


def _can_be_fixed(error: OSError, place: Path) -> bool:
    # ENOENT alone would also hide our own mistakes: here, a folder on the way is missing.
    is_missing = error.errno == errno.ENOENT and isinstance(error.filename, str)
    return error.errno in CANNOT_WRITE or (
        is_missing and place.absolute().is_relative_to(Path(error.filename).absolute().parent)
    )


def _beside(path: Path) -> Path:
    # Processes of several machines may write the same file.
    return path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
