"""Tiled TIFF pages, decoded tile by tile with tifffile: several times cheaper than OpenSlide."""

import logging
import os
import struct
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from serve.images.readers.errors import SlideFormatError, SlideReadError
from serve.images.readers.squares import squares_of

# Of a damaged file it tells each wrong tag on standard error; our one error says enough.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

_CACHED_BYTES = 64 * 2**20
"""Decoded tiles that are kept per level: about one row of a block's."""
TIFF_ERRORS = (
    tifffile.TiffFileError,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What tifffile and imagecodecs raise on broken files; imagecodecs' errors are RuntimeErrors."""


def open_tiff(path: Path) -> tifffile.TiffFile:
    """Open a TIFF alone: the OME-XML of a set names other files, with pages of their own."""
    return tifffile.TiffFile(path, _multifile=False)


def first_page(tiff: tifffile.TiffFile) -> tifffile.TiffPage:
    """The first page of a TIFF, which is always read in full."""
    page = tiff.pages[0]
    assert isinstance(page, tifffile.TiffPage)
    return page


class TiledPage:
    """Reads regions of a tiled 8-bit RGB page; threads may share it.

    Args:
        page: of an open TIFF.
        path: of that TIFF, for messages and for reading without a lock.

    Raises:
        SlideFormatError: the sides of the page or its tiles are no numbers of pixels.
    """

    def __init__(self, page: tifffile.TiffPage, path: Path) -> None:
        sides = page.imagewidth, page.imagelength, page.tilewidth, page.tilelength
        if not all(isinstance(side, int) and side > 0 for side in sides):
            raise SlideFormatError(
                f"{path.name} is damaged: it has a level of {sides[0]} x {sides[1]} pixels in "
                f"tiles of {sides[2]} x {sides[3]}. Copy it again."
            )
        self._page = page
        self._name = path.name
        self._file = os.open(path, os.O_RDONLY)
        self._tile_height, self._tile_width = page.tilelength, page.tilewidth
        self._across = -(-page.imagewidth // page.tilewidth)
        tile_bytes = page.tilelength * page.tilewidth * 3
        self._most_tiles = max(_CACHED_BYTES // tile_bytes, 4)
        self._tiles: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read a region of the page, in its pixels; white beyond its edges."""
        found = np.full((height, width, 3), 255, np.uint8)
        bottom, right = y + height, x + width
        bottom, right = min(bottom, self._page.imagelength), min(right, self._page.imagewidth)
        top, left = max(y, 0), max(x, 0)
        within = found[top - y :, left - x :]
        for square in squares_of(top, left, bottom, right, self._tile_height, self._tile_width):
            tile = self._tile(square.row * self._across + square.column)
            within[square.place] = tile[square.inside]
        return found

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _tile(self, index: int) -> NDArray[np.uint8]:
        with self._lock:
            tile = self._tiles.get(index)
            if tile is not None:
                self._tiles.move_to_end(index)
                return tile
        tile = self._decode(index)
        with self._lock:
            self._tiles[index] = tile
            while len(self._tiles) > self._most_tiles:
                self._tiles.popitem(last=False)
        return tile

    def _decode(self, index: int) -> NDArray[np.uint8]:
        page = self._page
        try:
            num_listed = min(len(page.dataoffsets), len(page.databytecounts))
            if index >= num_listed:
                raise ValueError(f"the file lists only {num_listed} tiles")
            offset, count = page.dataoffsets[index], page.databytecounts[index]
            data = os.pread(self._file, count, offset)
            if len(data) < count:
                raise ValueError(f"the file ends {count - len(data)} bytes early")
            decoded = page.decode(data or None, index, jpegtables=page.jpegtables)[0]
        except TIFF_ERRORS as error:
            row, column = divmod(index, self._across)
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise SlideReadError(
                f"{self._name}: the tile at x {column * self._tile_width}, y "
                f"{row * self._tile_height} of the level with {page.imagewidth} x "
                f"{page.imagelength} px cannot be read: {reason}. Copy the slide again."
            ) from error
        if decoded is None:  # a tile without data
            return np.full((self._tile_height, self._tile_width, 3), 255, np.uint8)
        return np.asarray(decoded[0])
