"""Slides through OpenSlide: Aperio, Hamamatsu, Leica, MIRAX, Philips, Ventana, DICOM and others.

OpenSlide 4.0.1 or later is needed: earlier ones write beyond their memory on crafted files
(CVE-2026-48977, CVE-2026-54604).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image

from serve.images.descriptions import aperio_sides
from serve.images.mpp import Stated, judge
from serve.images.readers.channels import refuse_stated, refuse_tiles, refuse_unlit, refuse_vmu
from serve.images.readers.dicom import check_files, series_in
from serve.images.readers.errors import (
    ReaderMissingError,
    SlideFormatError,
    SlideReadError,
)
from serve.images.readers.generic_tiff import (
    GENERIC,
    for_openslide,
    is_for_pictures,
    look_at,
    refuse,
    refuse_channels,
)
from serve.images.readers.reader import Bounds, RegionReader, pyramid
from serve.images.readers.slide_files import check_complete, missing_parts
from serve.images.readers.squares import squares_of

LEAST_VERSION = (4, 0, 1)
_LATTICE_PX = 1024
_DICOM = "dicom"
_DICOM_KIND, _RESAMPLED = "dicom.ImageType[3]", "RESAMPLED"
"""What level 0 says of itself: NONE where it is as it was scanned (DICOM PS3.3, C.8.12.4.1.1)."""


class OpenSlideReader(RegionReader):
    """See `RegionReader`."""

    name: ClassVar[str] = "openslide"

    def __init__(self, path: Path, *, mpp: float | None = None) -> None:
        super().__init__(path, mpp=mpp)
        check_openslide_version(openslide.__library_version__)
        entry = self._entry(path)
        check_complete(entry)
        vendor = openslide.OpenSlide.detect_format(entry)
        if vendor == GENERIC:
            refuse_channels(entry)
            refuse(entry, for_openslide(look_at(entry)))
        elif vendor == _DICOM:
            check_files(entry)
        else:
            refuse_tiles(entry)
            refuse_vmu(entry)
        self._slide = open_slide(entry)
        # A name that is not UTF-8 is listed, but not found.
        found = self._slide.properties
        self.properties: Mapping[str, str] = {name: found[name] for name in found if name in found}
        refuse_stated(path, self.properties)
        self.levels = pyramid(list(self._slide.level_dimensions))
        # Kept, since OpenSlide answers nothing after one region that it could not read.
        self._ratios = self._slide.level_downsamples
        self.version = f"OpenSlide {openslide.__library_version__}"
        self.bounds = self._bounds()
        self._stated = self._read_mpp()
        self.notes = self._missing_level()

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """See `RegionReader.read`."""
        ratio = self._ratios[level]
        if ratio == round(ratio):
            return self._read_from(level, x, y, width, height)
        # OpenSlide takes corners in whole pixels of level 0. Between pixels of the level it
        # interpolates, differently for each corner: so every pixel is read from a fixed one.
        found = np.empty((height, width, 3), np.uint8)
        for square in squares_of(y, x, y + height, x + width, _LATTICE_PX):
            corner = square.column * _LATTICE_PX, square.row * _LATTICE_PX
            rows, columns = square.inside
            part = self._read_from(level, *corner, columns.stop, rows.stop)
            found[square.place] = part[square.inside]
        return found

    def _read_from(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read a region from its own corner on."""
        ratio = self._ratios[level]
        corner = round(x * ratio), round(y * ratio)
        try:
            region = self._slide.read_region(corner, level, (width, height))
        except openslide.OpenSlideError as error:
            raise SlideReadError(
                f"{self.path.name}: the region at x {corner[0]}, y {corner[1]} of level {level} "
                f"cannot be read: {first_line(error)}. Copy the slide again, or scan it again."
            ) from error
        if region.getchannel("A").getextrema() != (255, 255):  # beyond what was scanned
            region = Image.alpha_composite(Image.new("RGBA", region.size, "white"), region)
        return np.array(region.convert("RGB"))

    def close(self) -> None:
        """See `RegionReader.close`."""
        self._slide.close()

    @classmethod
    def takes(cls, path: Path) -> bool:
        """See `RegionReader.takes`."""
        if path.is_dir():
            return bool(series_in(path))
        vendor = openslide.OpenSlide.detect_format(path)
        if vendor is None:
            return bool(missing_parts(path))  # then it says which
        return not (vendor == GENERIC and is_for_pictures(path, for_openslide))

    @staticmethod
    def _entry(path: Path) -> Path:
        """The file that OpenSlide opens: of a folder of DICOM files any one."""
        if path.is_dir():
            series = series_in(path)
            if len(series) != 1:
                raise SlideFormatError(
                    f"{path} is a folder with {len(series)} DICOM series, expected "
                    "one: a slide is a series. Name one file of the series that is meant."
                )
            return series[0][0]
        return path

    def _missing_level(self) -> tuple[str, ...]:
        """Tell where the finest level of a DICOM series says that there was a finer one."""
        if self.properties.get(_DICOM_KIND) != _RESAMPLED:
            return ()
        return (
            f"The finest level found, {self.width_px} x {self.height_px} px, was made from a finer "
            "one, whose file is missing. Copy all files of the DICOM series for full detail.",
        )

    def _bounds(self) -> Bounds:
        whole = Bounds(0, 0, self.width_px, self.height_px)
        names = ("bounds-x", "bounds-y", "bounds-width", "bounds-height")
        found = [self.properties.get(f"openslide.{name}") for name in names]
        if any(value is None for value in found):
            return whole
        x, y, width, height = (int(value) for value in found if value is not None)
        width, height = min(width, self.width_px - x), min(height, self.height_px - y)
        is_some = min(x, y) >= 0 and min(width, height) > 0
        return Bounds(x, y, width, height) if is_some else whole  # nothing was scanned: all white

    def _read_mpp(self) -> Stated:
        vendor = self.properties.get("openslide.vendor", "")
        if vendor == GENERIC:  # OpenSlide knows its resolution tags only
            return look_at(self.path).stated
        sides = self._numbers("openslide.mpp-x", "openslide.mpp-y")
        if vendor == "aperio":  # OpenSlide takes a reduced copy's um per pixel for the slide's own
            description = self.properties.get("openslide.comment", "").encode()
            sides = aperio_sides(description, (self.width_px, self.height_px)) or sides
        source = "Aperio MPP" if vendor == "aperio" else f"OpenSlide ({vendor})"
        return Stated() if sides is None else judge(*sides, source)

    def _numbers(self, *names: str) -> tuple[float, float] | None:
        """Two properties; None where one is missing or not a number."""
        try:
            x, y = (float(self.properties[name]) for name in names)
        except (KeyError, ValueError):
            return None
        return x, y


def open_slide(path: Path) -> openslide.OpenSlide:
    """Open a slide.

    Raises:
        SlideFormatError: OpenSlide does not take it.
        SlideChannelsError: it has no brightfield image.
    """
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise SlideFormatError(
            f"{path.name} is not a slide that OpenSlide {openslide.__library_version__} knows. "
            "Check that it is complete, or convert it to a pyramidal TIFF."
        ) from error
    except openslide.OpenSlideError as error:
        refuse_unlit(path, first_line(error))
        raise SlideFormatError(
            f"{path.name} cannot be opened: {first_line(error)}. Copy it again, or convert it to a "
            "pyramidal TIFF."
        ) from error


def check_openslide_version(found: str) -> None:
    """Raise ReaderMissingError for an OpenSlide with known security faults."""
    numbers = tuple(int(part) for part in found.split("-")[0].split(".")[:3] if part.isdigit())
    if numbers < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise ReaderMissingError(
            f"OpenSlide {found} is installed, at least {least} is expected: earlier ones can be "
            "attacked with crafted slides. Install openslide-bin again."
        )


def first_line(error: Exception) -> str:
    """What an error says, on one line without its full stop."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
