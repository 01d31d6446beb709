"""The protocol of slide readers: pyramid levels, um per pixel, and pixels of a region.

Frames: level 0 is the slide at full resolution. Pixel (x, y) of level k covers
`downsample_x` x `downsample_y` pixels of level 0, from (x * downsample_x, y * downsample_y) on.
"""

import hashlib
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from serve.contract.closing import Closing
from serve.images.mpp import (
    FROM_REQUEST,
    MAX_ASPECT,
    UNKNOWN,
    MppSource,
    PixelSize,
    Stated,
    check_mpp,
    contradiction,
)
from serve.images.readers.errors import SlideError, SlideFormatError, SlideScaleError
from serve.images.readers.scaled import ScaledView, read_scaled
from serve.images.readers.slide_files import FileState, files_of, state_of, watched_files

SQUARE = 0.02
"""Share by which the sides of a slide's pixels may differ and still be taken for squares (our
choice); others are resampled along each axis."""
_ROUNDED_PX, _ROUNDED = 2, 0.01
"""By how many pixels, and by which share beyond them, scanners round the sides of levels."""
_SAMPLE_BYTES = 2**16
_NUM_SAMPLES = 64


@dataclass(frozen=True)
class Level:
    """One level of the pyramid."""

    width_px: int
    height_px: int
    downsample_x: float
    """Pixels of level 0 along x for one of this level."""
    downsample_y: float
    is_whole: bool = True
    """It may show what level 0 shows; else, a label for example, nothing is read from it."""


@dataclass(frozen=True)
class Bounds:
    """The part of level 0 that was scanned, in its pixels."""

    x: int
    y: int
    width: int
    height: int


class RegionReader(Closing):
    """An open slide. Threads may share it; another process opens the slide for itself.

    Args:
        path: the slide's file or folder.
        mpp: um per pixel of level 0, where the caller knows better than the file.

    Raises:
        SlideError: the slide cannot be opened.
        OptionError: `mpp` is absurd.
    """

    name: ClassVar[str]
    """Name in the registry."""
    levels: tuple[Level, ...]
    """The pyramid, level 0 first."""
    bounds: Bounds
    """The scanned part; the whole of level 0 where the file does not say."""
    properties: Mapping[str, str]
    """What the file says of itself."""
    version: str
    """Name and version of the library that reads."""
    notes: tuple[str, ...] = ()
    """What a user should know of the slide; sentences."""
    orientation: int = 1
    """Of the stored pixels, as EXIF has it, 1 upright; those that are read are upright."""

    def __init__(self, path: Path, *, mpp: float | None = None) -> None:
        self.path = path
        self._watched = watched_files(path)
        self._state = state_of(self._watched)
        self._given_mpp = mpp
        self._stated = Stated()  # by the file; set by the subclass
        if mpp is not None:
            check_mpp(mpp)

    @classmethod
    @abstractmethod
    def takes(cls, path: Path) -> bool:
        """Whether this is the reader to open `path` with, judged by the content where it can be."""

    @abstractmethod
    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read a region.

        Args:
            level: index into `levels`.
            x: left edge, in pixels of that level.
            y: top edge, in pixels of that level.
            width: columns, at least 1.
            height: rows, at least 1.

        Returns:
            (height, width, 3) uint8, RGB in [0, 255]; white where the slide has no pixels.

        Raises:
            SlideReadError: the file is damaged there.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the file; the reader is not used after."""

    @property
    def width_px(self) -> int:
        """Columns of level 0."""
        return self.levels[0].width_px

    @property
    def height_px(self) -> int:
        """Rows of level 0."""
        return self.levels[0].height_px

    @property
    def mpp(self) -> float | None:
        """Um per pixel of level 0; None where neither the caller nor the file says it believably.

        Where pixels are not squares, the side of the square with the same area.
        """
        return None if self.pixel_size is None else self.pixel_size.mean

    @property
    def pixel_size(self) -> PixelSize | None:
        """Um per pixel of level 0 along each axis; None where it is not known.

        A file is believed as `serve.images.mpp` does, and where one side of a pixel is at most four
        times the other. Sides that differ by less than 2% count as their mean.
        """
        if self._given_mpp is not None:
            return PixelSize(self._given_mpp, self._given_mpp)
        size = self._stated.pixel_size
        if size is None or size.aspect > MAX_ASPECT:
            return None
        mean = sum(size) / 2
        return PixelSize(mean, mean) if size.aspect - 1 <= SQUARE else size

    @property
    def mpp_source(self) -> MppSource:
        """Who says `mpp`: the caller, or what in the file."""
        if self._given_mpp is not None:
            return FROM_REQUEST
        return UNKNOWN if self.mpp is None else self._stated.source

    @property
    def contradiction(self) -> tuple[str, ...]:
        """That the caller's um per pixel is another than the file's; a sentence, or none."""
        return contradiction(self._stated.pixel_size, self._stated.source, self._given_mpp)

    def require_pixel_size(self) -> PixelSize:
        """`pixel_size`, where it is known.

        Raises:
            SlideScaleError: it is not; the message says what the file claims.
        """
        size = self.pixel_size
        if size is None:
            raise SlideScaleError(
                f"{self.path.name}: {self._doubt()} Give the um per pixel: with --mpp, in the "
                "column `mpp` of a CSV, or as `mpp` of a request."
            )
        return size

    def _doubt(self) -> str:
        """Why the file's um per pixel is not used; a sentence."""
        stated = self._stated
        if stated.pixel_size is None:
            return stated.note or "The file does not say how large its pixels are."
        return (
            f"{stated.source} says {stated.pixel_size} um per pixel: one side is "
            f"{stated.pixel_size.aspect:.3g} times the other, expected at most {MAX_ASPECT:g}."
        )

    def at_mpp(self, mpp: float, *, tolerance: float = 0.0) -> ScaledView:
        """The slide's scanned part at another um per pixel.

        Args:
            mpp: um per pixel wanted.
            tolerance: a level whose um per pixel is within this share is taken as it is.

        Raises:
            SlideScaleError: the slide's own um per pixel is not known.
        """
        return ScaledView(self, mpp, tolerance=tolerance)

    def read_um(
        self, y_um: float, x_um: float, height_px: int, width_px: int, mpp: float
    ) -> NDArray[np.uint8]:
        """Read one region at any um per pixel, placed to half a pixel of what is returned.

        Args:
            y_um: top edge in um from the top of level 0.
            x_um: left edge in um from the left of level 0.
            height_px: rows wanted.
            width_px: columns wanted.
            mpp: um per pixel wanted.

        Returns:
            (height_px, width_px, 3) uint8, RGB in [0, 255]; white where the slide has no pixels.
        """
        own = self.require_pixel_size()
        corner, scale = (y_um / own.y, x_um / own.x), (mpp / own.y, mpp / own.x)
        return read_scaled(self, corner, (height_px, width_px), scale)

    def thumbnail(self, mpp: float) -> NDArray[np.uint8]:
        """The whole scanned part at `mpp` um per pixel, (H, W, 3) uint8."""
        view = self.at_mpp(mpp)
        return view.read(0, 0, view.height_px, view.width_px)

    def fingerprint(self) -> str:
        """SHA-256 of the slide's size and of 64 samples of its bytes, 64 hexadecimal digits.

        Sampled, because a slide has gigabytes: it tells slides apart and sees that a file was
        replaced or cut off, and does not see a single changed byte. A run opens a slide three
        times; it is sampled once, as long as no file's size or time of change is another.

        Raises:
            SlideError: another slide has taken its place since it was opened.
        """
        files = tuple(files_of(self.path))
        found = _fingerprint(self.path, files, state_of(files))
        self.check_unchanged()
        return found

    def check_unchanged(self) -> None:
        """Raise SlideError where one of its files was replaced or changed since it was opened."""
        if state_of(self._watched) != self._state:
            raise SlideError(
                f"{self.path.name} was replaced or changed while it was read. Run it again, once "
                "nothing writes to it."
            )

    def __reduce__(self) -> NoReturn:
        raise TypeError("an open slide cannot be sent to another process: open it there by path")


@lru_cache(maxsize=4)  # an OME-Zarr may have a hundred thousand files
def _fingerprint(path: Path, files: tuple[Path, ...], state: FileState) -> str:
    """See `RegionReader.fingerprint`; `state` is that of the files."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name if file != path else ''}:{size};".encode())
        with file.open("rb") as opened:
            step = max(size // _NUM_SAMPLES, _SAMPLE_BYTES)
            for start in range(0, size, step):
                opened.seek(start)
                digest.update(opened.read(_SAMPLE_BYTES))
            opened.seek(max(size - _SAMPLE_BYTES, 0))
            digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def pyramid(sizes: list[tuple[int, int]]) -> tuple[Level, ...]:
    """Levels from their (width, height), each scale a whole number where the sizes allow one.

    Scanners cut or round the last row and column, so that 2903 / 725 means 4: what is divided
    naively is wrong by a pixel of the level at the far edge.

    Raises:
        SlideFormatError: a level has no pixels.
    """
    if not sizes or min(map(min, sizes)) < 1:
        raise SlideFormatError(
            f"the slide has levels of {sizes} pixels, expected some of each. Copy it again."
        )
    full_width, full_height = sizes[0]
    return tuple(
        Level(
            width,
            height,
            _downsample(full_width, width),
            _downsample(full_height, height),
            _is_alike(full_width / full_height * height, width)
            or _is_alike(full_height / full_width * width, height),
        )
        for width, height in sizes
    )


def _is_alike(expected: float, found: int) -> bool:
    """Whether a side of a level is what the other one lets expect."""
    return abs(found - expected) <= _ROUNDED_PX + _ROUNDED * expected


def _downsample(full: int, part: int) -> float:
    """Pixels of level 0 for one of a level: a power of two if that may be, else a whole number.

    Of small levels the sizes allow several: 1023 / 15 is 68.2, and such a level is a 64th.
    """
    for whole in (2 ** round(math.log2(full / part)), round(full / part)):
        if whole >= 1 and full // whole <= part <= -(-full // whole):
            return float(whole)
    return full / part
