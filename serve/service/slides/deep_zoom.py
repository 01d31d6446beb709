"""Deep Zoom: a slide as square tiles, each level half as large as the next, the last one whole."""

import io
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.contract.errors import NotFoundError
from serve.images.readers.errors import SlideReadError
from serve.images.readers.reader import Bounds, RegionReader
from serve.images.readers.scaled import choose_level, read_scaled

TILE_PX, OVERLAP_PX = 254, 1
"""Side of a tile, and its overlap with each neighbour; together 256 pixels."""
THUMBNAIL_PX = 128
"""Most pixels of a thumbnail along each side."""
_JPEG_QUALITY = 80
_MOST_PIXELS = 600_000_000
"""Most pixels of the slide that one tile may need. More means that the slide has no pyramid."""


@dataclass(frozen=True)
class DeepZoom:
    """The tiles of the scanned part of a slide, in its pixels of level 0."""

    bounds: Bounds

    @property
    def num_levels(self) -> int:
        """Number of levels, from one pixel to full resolution."""
        return math.ceil(math.log2(max(self.bounds.width, self.bounds.height, 1))) + 1

    def scale(self, level: int) -> int:
        """Pixels of level 0 per pixel of a Deep Zoom level, along each axis."""
        return int(2 ** (self.num_levels - 1 - level))

    def place(self, level: int, column: int, row: int) -> tuple[int, int, int, int]:
        """x, y, width and height of a tile, in pixels of its level, with its overlap.

        Raises:
            NotFoundError: there is no such tile.
        """
        if 0 <= level < self.num_levels and column >= 0 and row >= 0:
            scale = self.scale(level)
            width, height = (-(-side // scale) for side in (self.bounds.width, self.bounds.height))
            left, right = _span(column, width)
            top, bottom = _span(row, height)
            if left < right and top < bottom:
                return left, top, right - left, bottom - top
        raise NotFoundError(
            f"There is no tile {column}_{row} of level {level}. GET /slides/ID says how many "
            "levels and pixels there are."
        )


def _span(index: int, length: int) -> tuple[int, int]:
    start = index * TILE_PX
    if start >= length:
        return 0, 0
    return max(start - OVERLAP_PX, 0), min(start + TILE_PX + OVERLAP_PX, length)


def tile_jpeg(reader: RegionReader, level: int, column: int, row: int) -> bytes:
    """A tile of an open slide as a JPEG.

    Raises:
        NotFoundError: there is no such tile.
        SlideReadError: the file is damaged there, or has no pyramid and is too large without.
    """
    zoom = DeepZoom(reader.bounds)
    zoom.place(level, column, row)
    # Below the thumbnail a level is one tile, of few pixels that reach far beyond the slide.
    finer = max(level, _thumbnail_level(zoom))
    pixels = _read(reader, zoom, zoom.scale(finer), zoom.place(finer, column, row))
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels).reduce(2 ** (finer - level))
    picture.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def thumbnail_jpeg(reader: RegionReader) -> bytes:
    """The whole scanned part as a JPEG: the finest level of at most `THUMBNAIL_PX` a side.

    Raises:
        SlideReadError: the file is damaged there, or has no pyramid and is too large without.
    """
    return tile_jpeg(reader, _thumbnail_level(DeepZoom(reader.bounds)), 0, 0)


def _thumbnail_level(zoom: DeepZoom) -> int:
    return min(int(math.log2(THUMBNAIL_PX)), zoom.num_levels - 1)


def _read(
    reader: RegionReader, zoom: DeepZoom, scale: int, place: tuple[int, int, int, int]
) -> NDArray[np.uint8]:
    """Read a tile, unless a slide without a pyramid would take too long."""
    x, y, width, height = place
    source = reader.levels[choose_level(reader.levels, (scale, scale))]
    row_px = width * scale * scale / source.downsample_x / source.downsample_y
    if row_px * height > _MOST_PIXELS:
        raise SlideReadError(
            f"{reader.path.name} has no pyramid, so a view of all of it would take too long. "
            "Convert it to a pyramidal TIFF.",
            code="slide_without_pyramid",
        )
    corner = zoom.bounds.y + y * scale, zoom.bounds.x + x * scale
    return read_scaled(reader, corner, (height, width), (scale, scale))
