"""Reads NumPy's npz files, in several threads at once."""

from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

_TRIES = 10


def read_npz(file: Path | IO[bytes]) -> dict[str, NDArray[Any]]:
    """Read all arrays of an npz, by name.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, no npz, or has arrays of Python objects.
    """
    if isinstance(file, Path):  # NumPy itself would leave a damaged file open
        with file.open("rb") as opened:
            return read_npz(opened)
    try:
        archive = np.load(file, allow_pickle=False)  # noqa: TID251
        if not isinstance(archive, NpzFile):
            raise ValueError("a single array, expected several")
        with archive:
            return {name: _read(archive, name) for name in archive.files}
    except OSError:
        raise
    except Exception as error:  # NumPy, zipfile, zlib and tokenize each have their own
        raise ValueError(f"no npz, or damaged: {error}") from error


def _read(archive: NpzFile, name: str) -> NDArray[Any]:
    """Read one array.

    NumPy parses an array's header with `ast`. CPython 3.11 counts the depth of such parsing for
    all threads together, and raises SystemError where another thread parses in the middle of it
    (python/cpython#106905). Nothing is wrong with the array then.
    """
    for tried in range(_TRIES):
        try:
            array = archive[name]
            break
        except SystemError:
            if tried == _TRIES - 1:
                raise
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} is no array")
    return array
