"""Keeps a second process from training into the same folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from train.errors import RunError

LOCK_FILE = ".lock"


@contextmanager
def only_run(run: Path, *, is_first: bool) -> Iterator[None]:
    """Hold the lock of a run's folder; it goes with the process, however that ends.

    Where the file system has no locks, as some network shares, nothing is held.

    Args:
        run: the folder, which exists.
        is_first: of the processes of one training, which share a folder, the first holds it.

    Raises:
        RunError: another training holds it.
    """
    if not is_first:
        yield
        return
    lock = FileLock(run / LOCK_FILE)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise RunError(
            f"another process trains in {run}. Wait until it has ended, or choose another folder."
        ) from error
    except NotImplementedError:
        yield
        return
    try:
        yield
    finally:
        (run / LOCK_FILE).unlink(missing_ok=True)
        lock.release()
