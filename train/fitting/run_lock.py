"""Keeps a second process from training into the same folder."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from train.errors import RunError

LOCK_FILE = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def file_lock(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a lock file; it goes with the process, however that ends.

    Where the file system has no locks, as some network shares, nothing is held.

    Yields:
        Whether it was free, or has become so.
    """
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        yield False
        return
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def only_run(run: Path, *, is_first: bool) -> Iterator[None]:
    """Hold the lock of a run's folder; see `file_lock`.

    Args:
        run: the folder, which exists.
        is_first: of the processes of one training, which share a folder, the first holds it.

    Raises:
        RunError: another training holds it.
    """
    if not is_first:
        yield
        return
    with file_lock(run / LOCK_FILE, wait=False) as free:
        if not free:
            raise RunError(
                f"another process trains in {run}. Wait until it has ended, or choose another "
                "folder."
            )
        try:
            yield
        finally:
            (run / LOCK_FILE).unlink(missing_ok=True)
