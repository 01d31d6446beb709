"""Which DICOM files belong together: a slide is a series, whose levels may be files of their own.

Only the head of a file is read, in Python: the service lists folders of strangers' files with this.
"""

import os
import struct
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_file_meta_info, read_partial
from pydicom.uid import DeflatedExplicitVRLittleEndian

from serve.images.readers.errors import SlideFormatError

PATTERN = "*.dcm"
_SERIES = 0x0020000E
_PIXELS = 0x7FE00010
_PIXELS_HEAD_BYTES = 12
_TABLE_HEAD = struct.Struct("<HHI")
_ITEM = (0xFFFE, 0xE000)
"""What compressed frames begin with: the table of their places is the first item."""
_READ_ERRORS = (
    BytesLengthException,
    InvalidDicomError,
    OSError,
    EOFError,
    LookupError,
    ValueError,
    AttributeError,
    TypeError,
    NotImplementedError,
    RecursionError,
)
"""What pydicom raises on broken files."""


def series_in(folder: Path) -> list[tuple[Path, ...]]:
    """The DICOM files of a folder, those of one series together.

    A file that cannot be read is alone: whoever opens it says what is wrong.
    """
    series: dict[str, list[Path]] = {}
    for path in sorted(folder.glob(PATTERN)):
        if path.is_file() and not path.name.startswith("."):
            series.setdefault(_series_of(path) or path.name, []).append(path)
    return [tuple(files) for files in series.values()]


def siblings_of(path: Path) -> tuple[Path, ...]:
    """All files of the series that a DICOM file belongs to, this one among them."""
    return next((files for files in series_in(path.parent) if path in files), (path,))


def check_frames(path: Path) -> None:
    """Raise SlideFormatError where the table of frames is damaged in a file of a slide.

    Looked at are its series, and files beside it that do not say of which series they are. The
    places of frames rise, and lie in the file. OpenSlide 4.0.1 would crash where they do not,
    and end the process.
    """
    own = _series_of(path)
    for file in sorted(path.parent.glob(PATTERN)):
        if not file.is_file() or (file != path and _series_of(file) not in ("", own)):
            continue
        try:
            places, end = _frames(file), file.stat().st_size
        except (*_READ_ERRORS, struct.error):  # OpenSlide says what is wrong
            continue
        if any(one >= other for one, other in pairwise([*places, end])):
            raise SlideFormatError(
                f"{file.name} is damaged: its table of {len(places)} frames names places that do "
                f"not follow each other, or lie beyond the {end} bytes of the file. Copy the slide "
                "again."
            )


def _frames(path: Path) -> list[int]:
    """Where compressed frames begin in a file; empty where it has no table of them."""
    if _is_deflated(path):
        return []
    with path.open("rb") as file:
        head = read_partial(file, stop_when=lambda tag, vr, length: tag >= _PIXELS)
        file.seek(_PIXELS_HEAD_BYTES, os.SEEK_CUR)
        *item, length = _TABLE_HEAD.unpack(file.read(_TABLE_HEAD.size))
        if tuple(item) != _ITEM:  # pixels that are not compressed
            return []
        table = struct.iter_unpack("<I", file.read(length))
        if not length:
            table = struct.iter_unpack("<Q", head.get("ExtendedOffsetTable", b""))
        start = file.tell()
        return [start + offset for (offset,) in table]


def _series_of(path: Path) -> str:
    try:
        state = path.stat()
        return _read_series(path, state.st_mtime_ns, state.st_size)
    except _READ_ERRORS:
        return ""


@lru_cache(maxsize=4096)
def _read_series(path: Path, modified_ns: int, size: int) -> str:
    """The series of a file as it was then; empty where it does not say."""
    if _is_deflated(path):
        return ""
    with path.open("rb") as file:
        head = read_partial(file, stop_when=lambda tag, vr, length: tag > _SERIES)
    value = head.get_item(_SERIES).value if _SERIES in head else b""
    return value.decode("ascii", "replace").strip("\0 ") if isinstance(value, bytes) else str(value)


def _is_deflated(path: Path) -> bool:
    """Whether reading the head of a file would decompress all of it."""
    syntax = read_file_meta_info(path).get("TransferSyntaxUID")
    return bool(syntax == DeflatedExplicitVRLittleEndian)
