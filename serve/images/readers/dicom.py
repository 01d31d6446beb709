"""Which DICOM files belong together: a slide is a series, whose levels may be files of their own.

Only the head of a file is read, in Python: the service lists folders of strangers' files with this.
"""

from functools import lru_cache
from pathlib import Path

from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info, read_partial
from pydicom.uid import DeflatedExplicitVRLittleEndian

PATTERN = "*.dcm"
_SERIES = 0x0020000E
_READ_ERRORS = (
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


def _series_of(path: Path) -> str:
    try:
        state = path.stat()
        return _read_series(path, state.st_mtime_ns, state.st_size)
    except _READ_ERRORS:
        return ""


@lru_cache(maxsize=4096)
def _read_series(path: Path, modified_ns: int, size: int) -> str:
    """The series of a file as it was then; empty where it does not say."""
    syntax = read_file_meta_info(path).get("TransferSyntaxUID")
    if syntax == DeflatedExplicitVRLittleEndian:  # would be decompressed whole
        return ""
    with path.open("rb") as file:
        head = read_partial(file, stop_when=lambda tag, vr, length: tag > _SERIES)
    value = head.get_item(_SERIES).value if _SERIES in head else b""
    return value.decode("ascii", "replace").strip("\0 ") if isinstance(value, bytes) else str(value)
