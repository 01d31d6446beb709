"""The blend of a block's tiles, with memory for one row of tiles only.

The arithmetic and its order are those of `serve.images.tiles.Blend`, so that a cell's label and
confidence are the same to the last bit as where the whole image is blended at once.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.contract.manifest import LOW_RES_STRIDE
from serve.images.tiles import gaussian_window
from serve.slides.plan import Rectangle


class BlendState(NamedTuple):
    """A blend in the middle of a block."""

    top: int
    """Rows that are decided."""
    sums: NDArray[np.float32]
    """(C, band, columns) weighted probabilities of the rows below."""
    weights: NDArray[np.float32]
    """(band, columns)."""
    labels: NDArray[np.uint8]
    """(top, columns)."""
    confidence: NDArray[np.uint8]
    """(top, columns)."""


class BlockBlend:
    """Sums of windowed tiles over a block: 4 C bytes per cell of a row of tiles.

    Tiles come row by row from top to bottom, as `Tiling.tile_rows` lists them.

    Args:
        num_classes: C.
        cells: of the block.
        tile: pixels of a tile.
    """

    def __init__(self, num_classes: int, cells: Rectangle, tile: int) -> None:
        self._cells = cells
        self._window = gaussian_window(tile // LOW_RES_STRIDE)
        rows, columns = cells.shape
        band = min(len(self._window), rows)
        self._sums = np.zeros((num_classes, band, columns), np.float32)
        self._weights = np.zeros((band, columns), np.float32)
        self._weighted = np.empty((num_classes, *self._window.shape), np.float32)
        self._top = 0  # row of the block that the band starts at
        self.labels = np.zeros((rows, columns), np.uint8)
        """(rows, columns) uint8, 1..C; 0 where no tile answered."""
        self.confidence = np.zeros((rows, columns), np.uint8)
        """(rows, columns) uint8, probability of the label, 255 = 1.0."""

    def add(self, y: int, x: int, probabilities: NDArray[np.uint8]) -> None:
        """Add the tile at (y, x), in pixels of the view: (C, T/4, T/4) uint8."""
        side = len(self._window)
        top, left = y // LOW_RES_STRIDE - self._cells.top, x // LOW_RES_STRIDE - self._cells.left
        if top > self._top:
            self._move_to(top)
        rows, columns = self._cells.shape
        first, last = max(-top, 0), min(side, rows - top)
        start, end = max(-left, 0), min(side, columns - left)
        part = slice(first, last), slice(start, end)
        row = top - self._top
        place = slice(row + first, row + last), slice(left + start, left + end)
        window = self._window[part]
        weighted = self._weighted[:, *part]
        np.copyto(weighted, probabilities[:, *part])
        weighted *= window
        self._sums[:, *place] += weighted
        self._weights[place] += window

    def state(self) -> BlendState:
        """What has been blended so far; arrays that change with the next tile."""
        return BlendState(
            self._top,
            self._sums,
            self._weights,
            self.labels[: self._top],
            self.confidence[: self._top],
        )

    def restore(self, state: BlendState) -> None:
        """Go on from where another blend of the same block was."""
        self._top = state.top
        self._sums[:] = state.sums
        self._weights[:] = state.weights
        self.labels[: self._top] = state.labels
        self.confidence[: self._top] = state.confidence

    def finish(self) -> None:
        """Decide the cells that are left."""
        self._decide(self._weights.shape[0])

    def _move_to(self, top: int) -> None:
        """No tile that comes reaches above row `top`: decide those rows, and move the band."""
        band = self._weights.shape[0]
        moved = top - self._top
        self._decide(min(moved, band))
        kept = max(band - moved, 0)
        self._sums[:, :kept] = self._sums[:, band - kept :]
        self._sums[:, kept:] = 0
        self._weights[:kept] = self._weights[band - kept :]
        self._weights[kept:] = 0
        self._top = top

    def _decide(self, num_rows: int) -> None:
        """Take the most probable class of the first rows of the band, where tiles answered."""
        num_rows = min(num_rows, self._cells.shape[0] - self._top)
        if num_rows <= 0:
            return
        answered = np.flatnonzero(self._weights[:num_rows].any(axis=0))
        if not len(answered):
            return
        columns = slice(int(answered[0]), int(answered[-1]) + 1)
        weights = self._weights[:num_rows, columns]
        sums = self._sums[:, :num_rows, columns]
        seen = weights > 0
        sums /= np.where(seen, weights, np.float32(1))
        winner = seen.astype(np.uint8)
        best = sums[0].copy()
        for index in range(1, len(sums)):
            np.copyto(winner, np.uint8(index + 1), where=sums[index] > best)
            np.maximum(best, sums[index], out=best)
        place = slice(self._top, self._top + num_rows), columns
        self.labels[place] = winner
        self.confidence[place] = np.rint(best, out=best).clip(0, 255, out=best)
