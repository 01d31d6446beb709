"""Which files a slide consists of: some formats keep their pixels beside the file that is opened.

MIRAX has a folder of the same name, whose `Slidedat.ini` names the data. Hamamatsu's VMS and VMU
are texts that name the pictures. A DICOM slide is a series of files (`dicom`).
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from serve.images.readers.errors import SlideError, SlideFormatError

_MIRAX = ".mrxs"
_SLIDEDAT = "Slidedat.ini"
_HAMAMATSU = (".vms", ".vmu")
_REQUIRED = re.compile(
    r"^\s*(?:ImageFile(?:\(\d+,\d+\)|\(0(?:,\d+,\d+)?\))?|MapFile|MacroImage|INDEXFILE|FILE_\d+)"
    r"\s*=[ \t]*(\S.*?)\s*$",
    re.MULTILINE,
)
"""Lines that name a file without which OpenSlide does not read the slide."""
_OPTIONAL = re.compile(r"^\s*(?:ImageFile[^=]*|OptimisationFile)=[ \t]*(\S.*?)\s*$", re.MULTILINE)
"""Lines that name another file, of another focal plane for example."""
_DICOM_AT, _DICOM = 128, b"DICM"
_MAX_TEXT_BYTES = 2**20
"""OpenSlide reads no more of these texts, either."""
_MAX_NAMED = 5
"""Of the missing files in one error."""

FileState = tuple[tuple[str, int, int, int], ...]
"""Name, inode, size and time of change in ns of each file."""


def parts_of(path: Path) -> list[Path]:
    """The files that belong to a MIRAX, VMS or VMU file; of other formats none.

    They are in the order of their names. Some of them may be missing.
    """
    others: list[Path] = []
    if path.suffix.lower() == _MIRAX:
        others = _files_in(path.with_suffix(""))
    elif path.suffix.lower() in _HAMAMATSU:
        others = _named(path, _OPTIONAL)
    return sorted({*_required(path), *others})


def missing_parts(path: Path) -> list[Path]:
    """The files without which a slide cannot be read, and which are not there."""
    return [file for file in _required(path) if not is_file(file)]


def check_complete(path: Path) -> None:
    """Raise SlideFormatError where files are missing that belong to a slide."""
    missing = missing_parts(path)
    if not missing:
        return
    some = ", ".join(os.path.relpath(file, path.parent) for file in missing[:_MAX_NAMED])
    more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
    raise SlideFormatError(
        f"{path.name} is only a part of its slide: {some}{more} should be beside it. Copy all "
        "files of the slide, and do not rename them."
    )


def is_folder_of_mirax(folder: Path) -> bool:
    """Whether a folder has the pixels of a MIRAX file beside it."""
    return is_file(folder / _SLIDEDAT) and is_file(folder.with_name(folder.name + _MIRAX))


def parts_in(folder: Path) -> set[Path]:
    """What VMS and VMU files of a folder name: pictures that are not slides of their own."""
    texts = [path for path in folder.iterdir() if path.suffix.lower() in _HAMAMATSU]
    return {part for text in texts if is_file(text) for part in parts_of(text)}


def files_of(path: Path) -> list[Path]:
    """All files of a slide that are there, the one that is opened first."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if is_dicom(path):
        from serve.images.readers.dicom import siblings_of

        return list(siblings_of(path))
    return [path, *filter(is_file, parts_of(path))]


def watched_files(path: Path) -> list[Path]:
    """The files that must not change while a slide is read; of an OME-Zarr its folder alone."""
    return [path, *dicom_files(path)] if path.is_dir() else files_of(path)


def is_file(path: Path) -> bool:
    """Whether a path is a file that can be looked at."""
    try:
        return path.is_file()
    except OSError:  # of a folder that may not be entered, or of a share that is gone
        return False


def is_dicom(path: Path) -> bool:
    """Whether a file begins as those of DICOM do; many have a suffix of their own, or none."""
    if not is_file(path):
        return False
    try:
        with path.open("rb") as file:
            return file.read(_DICOM_AT + len(_DICOM))[_DICOM_AT:] == _DICOM
    except OSError:  # not permitted, or removed
        return False


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files of a folder, by what they begin with."""
    return sorted(filter(is_dicom, _files_in(folder)))


def state_of(files: Sequence[Path]) -> FileState:
    """What tells whether files were replaced or written to.

    Raises:
        SlideError: one cannot be looked at.
    """
    found = []
    for file in files:
        try:
            state = file.stat()
        except OSError as error:
            raise SlideError(f"{file} cannot be read: {error.strerror}. Check the path.") from error
        found.append((file.name, state.st_ino, state.st_size, state.st_mtime_ns))
    return tuple(found)


def _required(path: Path) -> list[Path]:
    """The files without which a MIRAX, VMS or VMU file cannot be read."""
    if path.suffix.lower() == _MIRAX:
        text = path.with_suffix("") / _SLIDEDAT
        return [text, *_named(text, _REQUIRED)]
    return _named(path, _REQUIRED) if path.suffix.lower() in _HAMAMATSU else []


def _files_in(folder: Path) -> list[Path]:
    try:
        return [file for file in folder.iterdir() if is_file(file)]
    except OSError:  # not there, or it may not be entered
        return []


def _named(text: Path, lines: re.Pattern[str]) -> list[Path]:
    """The files that a text names, relative to where it is."""
    try:
        with text.open("rb") as file:
            content = file.read(_MAX_TEXT_BYTES).decode("utf-8-sig", "surrogateescape")
    except OSError:  # not there, or not permitted: told when the slide is opened
        return []
    names = dict.fromkeys(match[1] for match in lines.finditer(content) if "\0" not in match[1])
    return [text.parent / name for name in names]
