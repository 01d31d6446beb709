"""Opens a slide with the reader that fits, or with the one that is named.

A reader is a file here and an entry of `READERS`: the name that `--reader` takes, and where its
class is. Modules are imported when they are needed, since each needs libraries of its own.
"""

import importlib
import zipfile
from pathlib import Path

from serve.contract.extras import how_to_install
from serve.images.kinds import HEAD_BYTES, kind_of
from serve.images.readers.errors import ReaderMissingError, SlideError, SlideFormatError
from serve.images.readers.generic_tiff import look_at
from serve.images.readers.reader import RegionReader

READERS = {
    "tiff": "serve.images.readers.tiff:TiffReader",
    "ome-tiff": "serve.images.readers.ome_tiff:OmeTiffReader",
    "openslide": "serve.images.readers.openslide:OpenSlideReader",
    "ome-zarr": "serve.images.readers.ome_zarr:OmeZarrReader",
    "picture": "serve.images.readers.picture:PictureReader",
}
"""By name, in the order in which they are asked whether they take a file. DICOM is OpenSlide's."""
_PICTURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"RIFF")
_PICTURE = "a JPEG, PNG or WebP image"
_IN_STRIPS = "a TIFF in strips, which OpenSlide does not read"
_ENCRYPTED = 1
"""Bit of a zip entry's flags."""


def open_reader(path: Path, reader: str | None = None, *, mpp: float | None = None) -> RegionReader:
    """Open a slide.

    Args:
        path: the slide's file, or the folder of a DICOM series or an OME-Zarr.
        reader: name in `READERS`; by default the first that takes the file.
        mpp: um per pixel of level 0, where the caller knows better than the file.

    Raises:
        SlideFormatError: no reader takes the file.
        SlideChannelsError: it is not brightfield RGB with 8 bits per channel.
        ReaderMissingError: the named reader is unknown, or its libraries are not installed.
        OptionError: `mpp` is absurd.
    """
    if not path.exists():
        raise SlideFormatError(f"{path} does not exist. Check the path.")
    if not (path.is_file() or path.is_dir()):  # reading a pipe would wait for ever
        raise SlideFormatError(f"{path.name} is a pipe, socket or device, expected a file.")
    if reader is not None:
        return reader_class(reader)(path, mpp=mpp)
    missing = []
    for name in READERS:
        try:
            found = reader_class(name)
        except ReaderMissingError:
            missing.append(name)
            continue
        if found.takes(path):
            return found(path, mpp=mpp)
    hint = (
        f" Not installed: the readers {', '.join(missing)} ({how_to_install('slides')})."
        if missing
        else ""
    )
    archive = _archive_hint(path)
    if archive is not None:
        raise SlideFormatError(f"{path.name} is {archive}")
    kind = _kind_of(path)
    if kind in (_PICTURE, _IN_STRIPS):
        raise SlideFormatError(
            f"{path.name} is {kind}, and its name does not say that it is an image. Call it *.jpg, "
            "*.png, *.webp or *.tif, or name the reader `picture`."
        )
    what = "is not a slide or image that can be read: it is damaged, or of a kind that"
    if kind is not None:
        what = f"is {kind}, which"
    raise SlideFormatError(
        f"{path.name} {what} none of the readers {', '.join(READERS)} knows.{hint} Copy it again, "
        "or convert it to a pyramidal TIFF."
    )


def _kind_of(path: Path) -> str | None:
    if not path.is_file():
        return "a folder without OME-Zarr and DICOM"
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(_PICTURES):
        return _PICTURE
    return _IN_STRIPS if _is_in_strips(path) else kind_of(head)


def _is_in_strips(path: Path) -> bool:
    try:
        return look_at(path).pages[0].tile is None
    except SlideError:  # no TIFF, damaged, or not of one image
        return False


def _archive_hint(path: Path) -> str | None:
    """What to do with a zip archive that was sent as a slide."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        is_locked = any(entry.flag_bits & _ENCRYPTED for entry in archive.infolist())
    password = ", protected by a password" if is_locked else ""
    return f"a zip archive{password}. Unpack it, and give the slide inside."


def reader_class(name: str) -> type[RegionReader]:
    """The class of a reader by its name.

    Raises:
        ReaderMissingError: the name is unknown, or its libraries are not installed.
    """
    if name not in READERS:
        raise ReaderMissingError(f"no reader is called {name!r}, only {', '.join(READERS)}.")
    module, _, attribute = READERS[name].partition(":")
    try:
        found: type[RegionReader] = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("serve."):
            raise  # an entry of READERS is wrong
        raise ReaderMissingError(
            f"the reader {name!r} needs {error.name}, which is not installed: "
            f"{how_to_install('slides')}."
        ) from error
    return found
