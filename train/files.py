"""Files that appear whole or not at all, and what a user is told where they cannot be written."""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from train.errors import StorageError

CANNOT_WRITE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
)
"""Errors of the operating system that are for the user to remedy."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write, renamed to it at the end and removed on any failure.

    The file gets the mode that the umask gives, whatever the library that writes it sets:
    safetensors makes its files readable by their owner alone.

    Raises:
        FocalPathError: the disk is full, or may not be written.
    """
    # Processes of several machines may write the same file.
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    with write_errors_explained(path):
        try:
            partial.touch()
            mode = stat.S_IMODE(partial.stat().st_mode)
            yield partial
            partial.chmod(mode)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def write_errors_explained(place: Path) -> Iterator[None]:
    """Turn a full disk, or one that may not be written, into a user's error.

    Raises:
        FocalPathError: `place` cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in CANNOT_WRITE:
            raise
        raise StorageError(
            f"cannot write {place} ({error}). Expected a place that may be written, with room on "
            "the disk: free some or give another; what was written before is still whole."
        ) from error
