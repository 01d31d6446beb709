"""Which DICOM files belong together: a slide is a series, whose levels may be files of their own.

Only the head of a file is read, in Python: the service lists folders of strangers' files with this.
"""

import os
import re
import struct
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_file_meta_info, read_partial
from pydicom.uid import DeflatedExplicitVRLittleEndian, VLWholeSlideMicroscopyImageStorage

from serve.images.readers.errors import SlideFormatError
from serve.images.readers.slide_files import dicom_files, is_dicom, is_file

_SUFFIXES = (".dcm", ".dicom", ".dic")
_LETTER = re.compile("[a-z]")
_WHOLE_SLIDE = VLWholeSlideMicroscopyImageStorage
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
    ArithmeticError,
    AttributeError,
    TypeError,
    NotImplementedError,
    RecursionError,
)
"""What pydicom raises on broken files."""


def series_in(folder: Path) -> list[tuple[Path, ...]]:
    """The whole-slide images of a folder in DICOM, those of one series together.

    They are called *.dcm, or have no suffix of letters. A file that cannot be read is alone:
    whoever opens it says what is wrong.
    """
    series: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if path.name.startswith(".") or (suffix not in _SUFFIXES and _LETTER.search(suffix)):
            continue
        if is_dicom(path) or (suffix in _SUFFIXES and is_file(path)):
            found = _series_of(path)
            if found is not None:
                series.setdefault(found or path.name, []).append(path)
    return [tuple(files) for files in series.values()]


def siblings_of(path: Path) -> tuple[Path, ...]:
    """All files of the series that a DICOM file belongs to, this one among them."""
    own = _series_of(path)
    others = dicom_files(path.parent) if own else ()
    return tuple(sorted({path, *(file for file in others if _series_of(file) == own)}))


def check_files(path: Path) -> None:
    """Raise SlideFormatError for a DICOM slide on which OpenSlide 4.0.1 would crash or hang.

    It looks at every file beside the one that is opened, whatever it is called. Those of the series
    are looked at here, and those that do not say of which series they are.
    """
    own = _series_of(path)
    for file in sorted(path.parent.iterdir()):
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise SlideFormatError(
                f"{path.name} has a pipe, socket or device beside it, {file.name}, for which "
                "OpenSlide would wait. Move it out of the folder."
            )
        if is_dicom(file) and (file == path or _series_of(file) in ("", own)):
            state = file.stat()
            problem = _problem_of(file, state.st_mtime_ns, state.st_size)
            if problem:
                raise SlideFormatError(f"{file.name} {problem}")


@lru_cache(maxsize=4096)
def _problem_of(path: Path, modified_ns: int, size: int) -> str:
    """What is wrong with the frames of a file as it was then; empty where nothing is."""
    try:
        if _is_deflated(read_file_meta_info(path)):
            return ""
        with path.open("rb") as file:
            head = read_partial(file, stop_when=lambda tag, vr, length: tag >= _PIXELS)
            places = _places(file, head)
        if any(one >= other for one, other in pairwise([*places, size])):
            return (
                f"is damaged: its table of {len(places)} frames names places that do not follow "
                f"each other, or lie beyond the {size} bytes of the file. Copy the slide again."
            )
        if head.get("DimensionOrganizationType") != "TILED_SPARSE":
            return ""
        if "PerFrameFunctionalGroupsSequence" not in head:
            return (
                "is damaged: it does not say where its frames lie "
                "(PerFrameFunctionalGroupsSequence). Copy the slide again."
            )
        most = -(-head.TotalPixelMatrixColumns // head.Columns)
        most *= -(-head.TotalPixelMatrixRows // head.Rows)
        if head.NumberOfFrames > most:
            return (
                f"has {head.NumberOfFrames} frames for {most} places: several focal planes or "
                "optical paths, expected one. Write the one that is meant to a file of its own."
            )
    except (*_READ_ERRORS, struct.error):  # OpenSlide says what is wrong
        pass
    return ""


def _places(file: BinaryIO, head: Dataset) -> list[int]:
    """Where compressed frames begin; empty where there is no table of them.

    Args:
        file: at its pixels.
        head: what comes before them.
    """
    file.seek(_PIXELS_HEAD_BYTES, os.SEEK_CUR)
    *item, length = _TABLE_HEAD.unpack(file.read(_TABLE_HEAD.size))
    if tuple(item) != _ITEM:  # pixels that are not compressed
        return []
    table = struct.iter_unpack("<I", file.read(length))
    if not length:
        table = struct.iter_unpack("<Q", head.get("ExtendedOffsetTable", b""))
    start = file.tell()
    return [start + offset for (offset,) in table]


def _series_of(path: Path) -> str | None:
    """The series of a file; empty where it does not say, None where it is no whole-slide image."""
    try:
        state = path.stat()
        return _read_series(path, state.st_mtime_ns, state.st_size)
    except _READ_ERRORS:
        return ""


@lru_cache(maxsize=4096)
def _read_series(path: Path, modified_ns: int, size: int) -> str | None:
    """See `_series_of`; of the file as it was then."""
    meta = read_file_meta_info(path)
    if meta.get("MediaStorageSOPClassUID", _WHOLE_SLIDE) != _WHOLE_SLIDE:
        return None
    if _is_deflated(meta):
        return ""
    with path.open("rb") as file:
        head = read_partial(file, stop_when=lambda tag, vr, length: tag > _SERIES)
    value = head.get_item(_SERIES).value if _SERIES in head else b""
    return value.decode("ascii", "replace").strip("\0 ") if isinstance(value, bytes) else str(value)


def _is_deflated(meta: Dataset) -> bool:
    """Whether reading the head of a file would decompress all of it."""
    return bool(meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian)
