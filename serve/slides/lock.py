"""One process works on a slide at a time; the lock goes with the process, however it ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serve.slides.errors import ResultError


class SlideBusyError(ResultError):
    """Another process works on the slide."""

    code = "slide_busy"


@contextmanager
def slide_lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the lock file `path`.

    Yields:
        Whether it is held. Where the file system has no locks, such as some network shares, it is
        not, and two processes that work on the slide would take each other's files away.

    Raises:
        SlideBusyError: another process holds it, and `wait` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        is_held = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            os.close(handle)
            raise SlideBusyError(
                f"another run works on {path.stem}. Wait until it has ended."
            ) from error
        except OSError:  # no locks here
            is_held = False
        if _is_same(handle, path):
            break
        os.close(handle)  # who held it has deleted the file
    try:
        yield is_held
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock file; who asks may not be allowed to write there."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no such file, or there are no locks here
        pass
    return False


def _is_same(handle: int, path: Path) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    own = os.fstat(handle)
    return (own.st_dev, own.st_ino) == (found.st_dev, found.st_ino)
