"""Which blocks a plan has, and which tiles run for each."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from serve.contract.manifest import LOW_RES_STRIDE
from serve.images.tiles import tile_origins
from serve.slides.plan import Block, Plan, Rectangle
from serve.slides.tissue import Mask


@dataclass(frozen=True)
class TileRow:
    """The tiles of a block that start in the same row."""

    y: int
    """In pixels of the view."""
    x: tuple[int, ...]


class Tiling:
    """Which blocks a plan has, and which tiles run for each.

    Args:
        plan: of the slide.
        mask: its tissue, (h, w) bool, one for `plan.mask_px` pixels of the view.
    """

    def __init__(self, plan: Plan, mask: Mask) -> None:
        lengths = plan.height_px, plan.width_px
        assert mask.shape == tuple(-(-length // plan.mask_px) for length in lengths)
        self.plan = plan
        self.mask = mask
        tile = plan.model.tile_size_px
        heights = max(plan.shape[0] * LOW_RES_STRIDE, tile)
        widths = max(plan.shape[1] * LOW_RES_STRIDE, tile)
        self._rows = tile_origins(heights, tile, plan.settings.overlap)
        self._columns = tile_origins(widths, tile, plan.settings.overlap)
        padded = np.pad(mask, [(1, 0)] * 2)
        self._sums = padded.cumsum(axis=0, dtype=np.int32).cumsum(axis=1, dtype=np.int32)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks with tissue, row by row."""
        blocks = self.plan.all_blocks()
        return tuple(block for block in blocks if self._has_tissue(self.plan.rectangle(block)))

    def tile_rows(self, block: Block) -> list[TileRow]:
        """The tiles that cover tissue of a block, row by row.

        Every tile that covers a cell with tissue is among them: what is left out would only have
        answered for cells that are cleared.
        """
        rectangle = self.plan.rectangle(block)
        tile_cells = self.plan.model.tile_size_px // LOW_RES_STRIDE
        found = []
        for y in self._rows:
            top, bottom = _overlap(y, tile_cells, rectangle.top, rectangle.bottom)
            if top >= bottom:
                continue
            columns = []
            for x in self._columns:
                left, right = _overlap(x, tile_cells, rectangle.left, rectangle.right)
                if left < right and self._has_tissue(Rectangle(top, left, bottom, right)):
                    columns.append(x)
            if columns:
                found.append(TileRow(y, tuple(columns)))
        return found

    def num_tiles(self, block: Block) -> int:
        """How many tiles run for a block."""
        return sum(len(row.x) for row in self.tile_rows(block))

    def num_unique_tiles(self) -> int:
        """How many tiles have tissue under them; without those that two blocks run."""
        rows = (row for block in self.blocks for row in self.tile_rows(block))
        return len({(row.y, x) for row in rows for x in row.x})

    def cell_mask(self, rectangle: Rectangle) -> Mask:
        """Which cells of a rectangle are tissue, (rows, columns) bool."""
        side = self.plan.mask_px // LOW_RES_STRIDE
        part = self.mask[
            rectangle.top // side : -(-rectangle.bottom // side),
            rectangle.left // side : -(-rectangle.right // side),
        ]
        cells: NDArray[np.bool_] = part.repeat(side, axis=0).repeat(side, axis=1)
        rows, columns = rectangle.shape
        top, left = rectangle.top % side, rectangle.left % side
        return cells[top : top + rows, left : left + columns]

    def _has_tissue(self, cells: Rectangle) -> bool:
        side = self.plan.mask_px // LOW_RES_STRIDE
        top, left = cells.top // side, cells.left // side
        bottom, right = -(-cells.bottom // side), -(-cells.right // side)
        sums = self._sums
        total = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        return bool(total > 0)


def _overlap(origin_px: int, tile_cells: int, start: int, end: int) -> tuple[int, int]:
    """The cells of a tile along an axis that lie in [start, end)."""
    first = origin_px // LOW_RES_STRIDE
    return max(first, start), min(first + tile_cells, end)
