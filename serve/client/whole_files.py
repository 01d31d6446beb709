"""Writes files that are never seen half-written, even if the process ends in the middle."""

import shutil
import tempfile
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

_unfinished: set[Path] = set()
"""Scratch folders of the writes that are under way."""
_guard = threading.Lock()
"""Held while a scratch folder appears, and while finished files take their places."""
_GUARD_TIMEOUT_S = 5.0
"""Seconds after which a file system that does not finish a rename is not waited for."""


def write_together(folder: Path, contents: Mapping[str, bytes | Iterable[bytes]]) -> None:
    """Write files into a folder; they appear once all of them are complete, or not at all.

    Args:
        folder: created if it is missing.
        contents: by the files' names, each as a whole or block by block. The files appear in this
            order.

    Raises:
        OSError: a file cannot be written; it names the file or the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _guard:
        scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
        _unfinished.add(scratch)
    try:
        for name, content in contents.items():
            with (scratch / name).open("wb") as file:
                file.writelines((content,) if isinstance(content, bytes) else content)
        with _guard:
            for name in contents:
                (scratch / name).replace(folder / name)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a full disk names no file
            raise OSError(error.errno, error.strerror, str(folder)) from error
        raise
    finally:
        with _guard:
            shutil.rmtree(scratch, ignore_errors=True)
            _unfinished.discard(scratch)


def abandon_writing() -> None:
    """Remove all that is half-written, and let no other file appear: the process must end now.

    Other threads may be writing. They wait for the lock, which is never released.
    """
    _guard.acquire(timeout=_GUARD_TIMEOUT_S)
    while _unfinished:
        scratch = _unfinished.pop()
        while scratch.exists():  # a thread may still add a file to it
            shutil.rmtree(scratch, ignore_errors=True)
