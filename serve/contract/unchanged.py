"""What is read from a bundle, a result or a run comes from one of them, also while it is replaced.

Bundles and results are folders that appear whole: the old one is moved away, and the new one takes
its name. In a run's folder, files are replaced one by one.
"""

import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from serve.contract.errors import BackendUnavailableError

_ATTEMPTS = 5
_PAUSE_S = 0.1
"""Where there is no folder: between the two moves, there is none for a moment."""

T = TypeVar("T")
Stamp = tuple[tuple[str, int, int, int], ...]


def stamp_of(folder: Path, names: Collection[str] = ()) -> Stamp:
    """A value that changes with every file of the folder, or with those of these names.

    It is empty where there is none.
    """
    try:
        files = [
            (entry.name, entry.stat())
            for entry in os.scandir(folder)
            if (not names or entry.name in names) and entry.is_file()
        ]
    except OSError:  # it is being replaced
        return ()
    return tuple(sorted((n, s.st_ino, s.st_mtime_ns, s.st_size) for n, s in files))


def while_unchanged(
    folder: Path,
    read: Callable[[], T],
    *,
    names: Collection[str] = (),
    discard: Callable[[T], object] = lambda _: None,
) -> T:
    """Read something from the files of a folder, and again if they changed meanwhile.

    Otherwise the manifest of one bundle may be taken for the model of another, or a folder for
    damaged or missing that is only being replaced.

    Args:
        folder: has the files; those of folders within it are not looked at.
        read: reads them. An error counts only where they stayed as they were.
        names: of the files that count; without, all do.
        discard: called with what may be of two folders.

    Raises:
        BackendUnavailableError: the files change at every attempt.
    """
    for _ in range(_ATTEMPTS):
        before = stamp_of(folder, names)
        try:
            result = read()
        except Exception:
            if not before:
                time.sleep(_PAUSE_S)
            if stamp_of(folder, names) == before:
                raise
            continue
        if stamp_of(folder, names) == before:
            return result
        discard(result)
    raise BackendUnavailableError(
        f"{folder.name} changes again and again. Wait until it is written, and replace it as a "
        "whole."
    )
