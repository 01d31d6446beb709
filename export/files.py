"""Folders that change whole or not at all, even when the disk fills up or Ctrl-C comes.

`train.files.whole_file` does the same for one file.
"""

import fcntl
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from export.errors import StorageError
from serve.contract.interrupts import ending_signals
from train.files import CANNOT_WRITE


@contextmanager
def staging_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Give a folder inside `parent` to fill. It is deleted at the end with what is still in it.

    Raises:
        StorageError: the disk is full, or may not be written.
    """
    with _write_errors_explained(parent):
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replaced_whole(folder: Path) -> Iterator[Path]:
    """Give a folder to fill. It replaces `folder` at the end, and is deleted on failure.

    Raises:
        StorageError: the disk is full, or may not be written.
        KeyboardInterrupt: Ctrl-C came too late to stop the change; the message says what is there.
    """
    with _write_errors_explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(folder.parent, f".{folder.name}-") as staging:
        new, old = staging / "new", staging / "old"
        new.mkdir()
        yield new
        with one_at_a_time(folder.parent), uninterrupted(f"{folder} is the new one"):
            if folder.exists():
                os.replace(folder, old)
            try:
                os.replace(new, folder)
            except OSError:
                if old.exists():
                    os.replace(old, folder)
                raise
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[bool]:
    """Wait for other processes that hold the lock of a folder, and hold it.

    Yields:
        Whether it is held: some network shares have no locks.
    """
    handle, is_held = None, False
    try:
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
            is_held = True
        yield is_held
    finally:
        if handle is not None:
            os.close(handle)


@contextmanager
def _write_errors_explained(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        # Libraries that write to an open file do not say which file it was.
        raise StorageError(
            f"cannot write {place} ({error.strerror}); nothing was changed there. Expected a place "
            "that may be written, with room on the disk: free some space, or give another place."
        ) from error


@contextmanager
def uninterrupted(outcome: str) -> Iterator[None]:
    """Hold the signals that end a command back until the block is done.

    Raises:
        KeyboardInterrupt: Ctrl-C came during the block; its message is `outcome`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    held: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: held.append(number))
        for number in (signal.SIGINT, *ending_signals())
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if signal.SIGINT in held:
        raise KeyboardInterrupt(outcome)
    if held:
        signal.raise_signal(held[0])
