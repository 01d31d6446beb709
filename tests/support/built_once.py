"""Folders that tests download or build once, and keep for the next run."""

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path


def built_once(folder: Path, build: Callable[[Path], object]) -> Path:
    """Build a folder if it is not there; return it.

    It appears under its name only when it is complete. Several test processes may ask for it.

    Args:
        folder: its name should hold all versions that its content depends on.
        build: writes the content into the folder that it is given.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            # Only the process with the lock builds: what is left here was interrupted.
            building = folder.parent / ".building"
            shutil.rmtree(building, ignore_errors=True)
            build(building)
            building.rename(folder)
    return folder
