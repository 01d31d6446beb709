"""Keeps a second process from training into the same folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serve.contract.file_lock import file_lock
from train.errors import RunError

LOCK_FILE = ".lock"


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
