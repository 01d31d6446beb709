"""What is read from a bundle comes from one bundle, also while another takes its place."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from serve.contract.errors import BackendUnavailableError, FocalPathError

_ATTEMPTS = 5
_PAUSE_S = 0.1
"""After an error. A bundle that is being replaced is not there for a moment."""

T = TypeVar("T")
Stamp = tuple[tuple[str, int, int, int], ...]


def stamp_of(bundle: Path) -> Stamp:
    """A value that changes with every file of the bundle; empty where there is no folder."""
    try:
        files = [(entry.name, entry.stat()) for entry in os.scandir(bundle) if entry.is_file()]
    except OSError:  # it is being replaced
        return ()
    return tuple(sorted((n, s.st_ino, s.st_mtime_ns, s.st_size) for n, s in files))


def while_unchanged(
    bundle: Path, read: Callable[[], T], *, discard: Callable[[T], object] = lambda _: None
) -> T:
    """Read something from the files of a bundle, and again if they changed meanwhile.

    Otherwise the manifest of one bundle may be taken for the model of another, or a bundle for
    damaged that is only being replaced.

    Args:
        bundle: the bundle's folder.
        read: reads its files. An error counts only where they stayed as they were.
        discard: called with what may be of two bundles.

    Raises:
        BackendUnavailableError: the files change at every attempt.
    """
    for _ in range(_ATTEMPTS):
        before = stamp_of(bundle)
        try:
            result = read()
        except (FocalPathError, OSError):
            time.sleep(_PAUSE_S)
            if stamp_of(bundle) == before:
                raise
            continue
        if stamp_of(bundle) == before:
            return result
        discard(result)
    raise BackendUnavailableError(
        f"{bundle} changes again and again. Wait until it is written, and replace a bundle as a "
        "whole."
    )
