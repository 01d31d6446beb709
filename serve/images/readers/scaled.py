"""A slide at any um per pixel: the level is chosen, the rest is resampled with antialiasing.

What a view returns for a pixel does not depend on which region was asked for: it is resampled in
cells of a fixed grid, each from its own rectangle of the level. So neighbouring regions fit, and
a result does not depend on how a slide was divided.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from serve.images.readers.reader import Level, RegionReader

_CELL_PX = 256
"""Side of the cells in which a view is resampled, in pixels of the view or of the level, whichever
is finer."""
_LEAST_CELL_PX = 16
_PIXELS_AT_ONCE = 16_000_000
"""Pixels of the level that are in memory at the same time, about."""
_SLACK = 1.001
"""A level that is coarser than wanted by less than this is as wanted: sizes are rounded."""
_BICUBIC_SUPPORT = 2.0
_WHITE = 255
_NOTHING_PX = 1e-6
"""Part of a pixel that is none: numbers are rounded."""


class ScaledView:
    """The scanned part of a slide at one um per pixel.

    Args:
        reader: the open slide; not closed by this.
        mpp: um per pixel wanted.
        tolerance: a level whose um per pixel is within this share is taken as it is.

    Raises:
        SlideScaleError: the slide's own um per pixel is not known.
    """

    def __init__(self, reader: "RegionReader", mpp: float, *, tolerance: float = 0.0) -> None:
        self._reader = reader
        self.mpp = mpp
        own = reader.require_pixel_size()
        scale = mpp / own.y, mpp / own.x  # pixels of level 0 for one of the view
        self.level = choose_level(reader.levels, scale, tolerance)
        level = reader.levels[self.level]
        self.bounds = bounds = reader.bounds
        """The scanned part, in pixels of level 0."""
        left = math.floor(bounds.x / level.downsample_x)
        top = math.floor(bounds.y / level.downsample_y)
        right = min(math.ceil((bounds.x + bounds.width) / level.downsample_x), level.width_px)
        bottom = min(math.ceil((bounds.y + bounds.height) / level.downsample_y), level.height_px)
        self._corner = top, left  # in pixels of the level
        self._size = bottom - top, right - left  # in pixels of the level
        self.is_resampled = any(
            abs(downsample / wanted - 1) > max(tolerance, _SLACK - 1)
            for downsample, wanted in zip(
                (level.downsample_y, level.downsample_x), scale, strict=True
            )
        )
        """Whether pixels are computed, not copied from the level."""
        if self.is_resampled:
            self.height_px = max(round(self._size[0] * level.downsample_y / scale[0]), 1)
            self.width_px = max(round(self._size[1] * level.downsample_x / scale[1]), 1)
        else:
            self.height_px, self.width_px = self._size
        self.step_px = (
            self._size[0] * level.downsample_y / self.height_px,
            self._size[1] * level.downsample_x / self.width_px,
        )
        """(y, x) pixels of level 0 from one pixel of the view to the next."""
        self.origin_px = top * level.downsample_y, left * level.downsample_x
        """(y, x) of the view's top left corner, in pixels of level 0."""
        coarser = max(self._size[0] / self.height_px, self._size[1] / self.width_px, 1)
        self._cell_px = max(_CELL_PX >> round(math.log2(coarser)), _LEAST_CELL_PX)

    def read(self, y: int, x: int, height: int, width: int) -> NDArray[np.uint8]:
        """Read a region that lies within the view.

        Args:
            y: top edge, in pixels of the view.
            x: left edge.
            height: rows.
            width: columns.

        Returns:
            (height, width, 3) uint8, RGB in [0, 255].

        Raises:
            SlideReadError: the file is damaged there.
        """
        assert 0 <= y < y + height <= self.height_px, (y, height, self.height_px)
        assert 0 <= x < x + width <= self.width_px, (x, width, self.width_px)
        if not self.is_resampled:
            top, left = self._corner
            return self._reader.read(self.level, left + x, top + y, width, height)
        found = np.empty((height, width, 3), np.uint8)
        rows = _cells(y, height, self.height_px, self._size[0], self._cell_px)
        columns = _cells(x, width, self.width_px, self._size[1], self._cell_px)
        for some_rows, some_columns in _groups(rows, columns):
            self._read_cells(found, (y, x), some_rows, some_columns)
        return found

    def overview(self, factor: int) -> NDArray[np.uint8]:
        """The whole view, one pixel for `factor` x `factor` of it; the last may reach beyond it.

        Returns:
            (ceil(height_px / factor), ceil(width_px / factor), 3) uint8, RGB in [0, 255].
        """
        height, width = -(-self.height_px // factor), -(-self.width_px // factor)
        scale = self.step_px[0] * factor, self.step_px[1] * factor
        return read_scaled(self._reader, self.origin_px, (height, width), scale)

    def _read_cells(
        self,
        found: NDArray[np.uint8],
        corner: tuple[int, int],
        rows: "list[_Cell]",
        columns: "list[_Cell]",
    ) -> None:
        """Read the source of some cells at once, and resample each cell into `found`."""
        top, left = rows[0].source_start, columns[0].source_start
        source = self._reader.read(
            self.level,
            self._corner[1] + left,
            self._corner[0] + top,
            columns[-1].source_end - left,
            rows[-1].source_end - top,
        )
        for row in rows:
            for column in columns:
                part = source[
                    row.source_start - top : row.source_end - top,
                    column.source_start - left : column.source_end - left,
                ]
                cell = _resize(part, row.size, column.size, row.box, column.box)
                place = row.place(corner[0]), column.place(corner[1])
                found[place] = cell[row.wanted, column.wanted]


class _Cell:
    """One cell of the grid along one axis, and where its pixels come from."""

    def __init__(
        self, start: int, cell_px: int, wanted: range, length: int, source_length: int
    ) -> None:
        end = min(start + cell_px, length)
        factor = source_length / length
        margin = _BICUBIC_SUPPORT * max(factor, 1) + 1
        self.start, self.size = start, end - start
        self.source_start = max(math.floor(start * factor - margin), 0)
        self.source_end = min(math.ceil(end * factor + margin), source_length)
        self.box = start * factor - self.source_start, end * factor - self.source_start
        self._from, self._to = max(wanted.start, start), min(wanted.stop, end)
        self.wanted = slice(self._from - start, self._to - start)

    def place(self, origin: int) -> slice:
        return slice(self._from - origin, self._to - origin)


def _cells(start: int, size: int, length: int, source_length: int, cell_px: int) -> list[_Cell]:
    """The cells of the grid that a region of an axis reaches into."""
    wanted = range(start, start + size)
    first = start // cell_px * cell_px
    return [
        _Cell(cell, cell_px, wanted, length, source_length)
        for cell in range(first, start + size, cell_px)
    ]


def _groups(rows: list[_Cell], columns: list[_Cell]) -> Iterator[tuple[list[_Cell], list[_Cell]]]:
    """Cells that are read at once: as many as the memory allows, at least one."""
    row_px, column_px = (
        (cells[-1].source_end - cells[0].source_start) / len(cells) for cells in (rows, columns)
    )
    num_columns = min(max(int(_PIXELS_AT_ONCE / (row_px * column_px)), 1), len(columns))
    num_rows = max(int(_PIXELS_AT_ONCE / (row_px * column_px * num_columns)), 1)
    for row in range(0, len(rows), num_rows):
        for column in range(0, len(columns), num_columns):
            yield rows[row : row + num_rows], columns[column : column + num_columns]


def _resize(
    pixels: NDArray[np.uint8],
    height: int,
    width: int,
    rows: tuple[float, float],
    columns: tuple[float, float],
) -> NDArray[np.uint8]:
    """Resample a box of the pixels; what it needs around it lies in the pixels."""
    box = (columns[0], rows[0], min(columns[1], pixels.shape[1]), min(rows[1], pixels.shape[0]))
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


def choose_level(
    levels: "tuple[Level, ...]", scale: tuple[float, float], tolerance: float = 0.0
) -> int:
    """The coarsest level that is not coarser than wanted along any axis; level 0 where all are.

    Args:
        levels: of the slide, level 0 first.
        scale: (y, x) pixels of level 0 for one that is wanted.
        tolerance: share by which a level may be coarser.
    """
    y, x = (side * max(_SLACK, 1 + tolerance) for side in scale)
    fine = [
        index
        for index, level in enumerate(levels)
        if level.is_whole and level.downsample_y <= y and level.downsample_x <= x
    ]
    return max(fine, key=lambda index: levels[index].downsample_x, default=0)


def read_scaled(
    reader: "RegionReader",
    corner: tuple[float, float],
    size: tuple[int, int],
    scale: tuple[float, float],
) -> NDArray[np.uint8]:
    """Read a region of level 0 that starts anywhere, at any scale, strip by strip.

    Args:
        reader: the open slide.
        corner: (y, x) of the top left corner in pixels of level 0.
        size: (height, width) in pixels of what is returned.
        scale: (y, x) pixels of level 0 for one that is returned.

    Returns:
        (height, width, 3) uint8, RGB in [0, 255]; white where the slide has no pixels.
    """
    (y, x), (height, width) = corner, size
    index = choose_level(reader.levels, scale)
    level = reader.levels[index]
    row_px = width * scale[0] * scale[1] / level.downsample_y / level.downsample_x
    rows = max(int(_PIXELS_AT_ONCE / row_px), 1)
    found = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        strip = found[top : top + rows]
        strip[...] = _read_strip(reader, index, (y + top * scale[0], x), strip.shape[:2], scale)
    return found


def _read_strip(
    reader: "RegionReader",
    index: int,
    corner: tuple[float, float],
    size: tuple[int, int],
    scale: tuple[float, float],
) -> NDArray[np.uint8]:
    """Read a region at once, from the level of this index.

    Pixels at the slide's edge are made of the slide alone, as in `ScaledView` and where images are
    resampled whole; those that reach beyond it continue its edge.
    """
    (y, x), (height, width), level = corner, size, reader.levels[index]
    margin = math.ceil(_BICUBIC_SUPPORT * max(max(scale) / level.downsample_x, 1)) + 1
    y_step, x_step = scale[0] / level.downsample_y, scale[1] / level.downsample_x
    rows = _Span(y / level.downsample_y, y_step, height, level.height_px, margin)
    columns = _Span(x / level.downsample_x, x_step, width, level.width_px, margin)
    found = np.full((height, width, 3), _WHITE, np.uint8)
    if not (rows.is_within.any() and columns.is_within.any()):
        return found
    (top, bottom), (left, right) = rows.source, columns.source
    pixels = reader.read(index, left, top, right - left, bottom - top)
    pixels = np.pad(pixels, (rows.beyond, columns.beyond, (0, 0)), mode="edge")
    resized = _resize(pixels, height, width, rows.box, columns.box)
    places = np.ix_(rows.is_within, columns.is_within)
    found[places] = resized[places]
    return found


class _Span:
    """One axis of a region in pixels of a level, which may reach beyond the level's edges."""

    def __init__(self, start: float, step: float, count: int, length: int, margin: int) -> None:
        end, edges = start + step * count, start + step * np.arange(count + 1)
        self.is_within: NDArray[np.bool_] = (edges[1:] > _NOTHING_PX) & (
            edges[:-1] < length - _NOTHING_PX
        )
        """Of each pixel that is wanted, whether any of it lies in the level."""
        self.beyond = (
            max(-math.floor(start + _NOTHING_PX), 0),
            max(math.ceil(end - _NOTHING_PX) - length, 0),
        )
        """Pixels that the region reaches beyond the level, before and behind it."""
        self.source = (
            max(math.floor(start) - margin, 0),
            min(math.ceil(end) + margin, length),
        )
        """Where the level is read: the region and the margin, as far as they lie in it."""
        shift = self.beyond[0] - self.source[0]
        self.box = max(start + shift, 0.0), end + shift
        """The region in what was read, with the pixels beyond."""
