"""The pixels of a block's tiles: each is read once per block, by several threads, read ahead."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future

import numpy as np
from numpy.typing import NDArray

from serve.images.readers.scaled import ScaledView
from serve.images.readers.squares import squares_of
from serve.images.tiles import pad_by_reflection
from serve.slides.tiling import TileRow

CHUNK_PX = 256
"""Side of the squares that are kept while tiles overlap them; on the grid of every view."""
_RUN_CHUNKS = 8
"""Most chunks that one thread reads at once."""

_Chunk = tuple[int, int]
"""(row, column) on the grid of chunks."""


class TilePixels:
    """Cuts tiles out of a view, at most a row of tiles in memory.

    Args:
        view: the slide at the model's um per pixel.
        tile: pixels of a tile.
        executor: its threads read.
    """

    def __init__(self, view: ScaledView, tile: int, executor: Executor) -> None:
        self._view = view
        self._tile = tile
        self._executor = executor

    def tiles(self, rows: Sequence[TileRow]) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
        """Each tile's (y, x) and its (T, T, 3) uint8 pixels; the edges are mirrored.

        Raises:
            SlideReadError: the file is damaged there.
        """
        held: dict[_Chunk, NDArray[np.uint8]] = {}
        ahead = self._read(rows[0], held) if rows else []
        for index, row in enumerate(rows):
            for (top, left), future in ahead:
                _split(future.result(), top, left, held)
            following = rows[index + 1] if index + 1 < len(rows) else None
            if following is not None:
                ahead = self._read(following, held)
            for x in row.x:
                yield row.y, x, self._cut(row.y, x, held)
            if following is not None:
                needed = set(self._chunks(following))
                held = {chunk: pixels for chunk, pixels in held.items() if chunk in needed}

    def _chunks(self, row: TileRow) -> list[_Chunk]:
        """The chunks that a row of tiles lies on, row by row."""
        bottom = min(row.y + self._tile, self._view.height_px)
        found = {
            (square.row, square.column)
            for x in row.x
            for square in squares_of(
                row.y, x, bottom, min(x + self._tile, self._view.width_px), CHUNK_PX
            )
        }
        return sorted(found)

    def _read(
        self, row: TileRow, held: dict[_Chunk, NDArray[np.uint8]]
    ) -> list[tuple[_Chunk, Future[NDArray[np.uint8]]]]:
        """Start reading what is missing, in rectangles of chunks."""
        missing: dict[int, list[int]] = {}
        for line, column in self._chunks(row):
            if (line, column) not in held:
                missing.setdefault(column, []).append(line)
        runs: list[tuple[int, int, list[int]]] = []  # first column, last column, rows
        for column in sorted(missing):
            lines = missing[column]
            if runs:
                first, last, same = runs[-1]
                if last == column - 1 and same == lines and column - first < _RUN_CHUNKS:
                    runs[-1] = first, column, same
                    continue
            runs.append((column, column, lines))
        return [
            ((lines[0], first), self._executor.submit(self._read_chunks, first, last, lines))
            for first, last, lines in runs
        ]

    def _read_chunks(self, first: int, last: int, lines: list[int]) -> NDArray[np.uint8]:
        y, x = lines[0] * CHUNK_PX, first * CHUNK_PX
        bottom = min((lines[-1] + 1) * CHUNK_PX, self._view.height_px)
        right = min((last + 1) * CHUNK_PX, self._view.width_px)
        return self._view.read(y, x, bottom - y, right - x)

    def _cut(self, y: int, x: int, held: dict[_Chunk, NDArray[np.uint8]]) -> NDArray[np.uint8]:
        bottom = min(y + self._tile, self._view.height_px)
        right = min(x + self._tile, self._view.width_px)
        tile = np.empty((bottom - y, right - x, 3), np.uint8)
        for square in squares_of(y, x, bottom, right, CHUNK_PX):
            tile[square.place] = held[square.row, square.column][square.inside]
        return pad_by_reflection(tile, self._tile, self._tile)


def _split(
    pixels: NDArray[np.uint8], line: int, column: int, held: dict[_Chunk, NDArray[np.uint8]]
) -> None:
    """Keep a rectangle that was read as chunks. They are views: the rectangle stays in memory."""
    for top in range(0, pixels.shape[0], CHUNK_PX):
        for left in range(0, pixels.shape[1], CHUNK_PX):
            chunk = line + top // CHUNK_PX, column + left // CHUNK_PX
            held[chunk] = pixels[top : top + CHUNK_PX, left : left + CHUNK_PX]
