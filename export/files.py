"""Folders that change whole or not at all, also where the disk is full or Ctrl-C comes."""

import errno
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.errors import FocalPathError


@contextmanager
def staging_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Give a folder inside `parent` to fill; what was not moved out of it vanishes at the end.

    Raises:
        FocalPathError: the disk is full.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield folder
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # Libraries that write to an open file do not say which.
        raise FocalPathError(
            f"no space left on the disk of {parent}; nothing was changed there. Free some space, "
            "or choose a folder on another disk."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replaced_whole(folder: Path) -> Iterator[Path]:
    """Give a folder to fill that takes the place of `folder` at the end, or vanishes on failure.

    Raises:
        FocalPathError: the disk is full.
        KeyboardInterrupt: with what it says, where Ctrl-C came too late to stop the change.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(folder.parent, f".{folder.name}-") as staging:
        new, old = staging / "new", staging / "old"
        new.mkdir()
        yield new
        with uninterrupted(f"{folder} is the new one"):
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
def uninterrupted(outcome: str) -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block is done.

    Raises:
        KeyboardInterrupt: with `outcome`, after the block, where Ctrl-C came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    held: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: held.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
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
