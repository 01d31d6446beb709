"""Writing a data set's folder: whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.errors import FocalPathError
from train.files import CANNOT_WRITE


@contextmanager
def whole_or_not_at_all(folder: Path) -> Iterator[Path]:
    """Give a folder beside `folder` to fill, renamed to it at the end and removed on any failure.

    Raises:
        FocalPathError: the disk is full, or may not be written.
    """
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise FocalPathError(
            f"cannot write {folder} ({error}); nothing was kept. Expected a folder that may be "
            "written, with space for the tiles: free some, or give another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON that a person can read."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
