"""Which blocks a plan has, and which tiles run for each."""

from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from serve.contract.manifest import LOW_RES_STRIDE
from serve.images.tiles import tile_origins
from serve.slides.plan import Block, Plan, Rectangle
from serve.slides.tissue import Mask

Ints = NDArray[np.int64]


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
        self._rows, self._columns = (
            np.array(tile_origins(length, tile, plan.settings.overlap))
            for length in (heights, widths)
        )
        padded = np.pad(mask, [(1, 0)] * 2)
        self._sums = padded.cumsum(axis=0, dtype=np.int32).cumsum(axis=1, dtype=np.int32)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks with tissue, row by row."""
        blocks = self.plan.all_blocks()
        rectangles = [astuple(self.plan.rectangle(block)) for block in blocks]
        return tuple(compress(blocks, self._has_tissue(*np.array(rectangles).T)))

    def tile_rows(self, block: Block) -> list[TileRow]:
        """The tiles that cover tissue of a block, row by row.

        Every tile that covers a cell with tissue is among them: what is left out would only have
        answered for cells that are cleared.
        """
        rectangle = self.plan.rectangle(block)
        y, top, bottom = self._reaching(self._rows, rectangle.top, rectangle.bottom)
        x, left, right = self._reaching(self._columns, rectangle.left, rectangle.right)
        has_tissue = self._has_tissue(top[:, None], left, bottom[:, None], right)
        return [
            TileRow(int(start), tuple(x[covers].tolist()))
            for start, covers in zip(y, has_tissue, strict=True)
            if covers.any()
        ]

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

    def _reaching(self, origins: Ints, start: int, end: int) -> tuple[Ints, Ints, Ints]:
        """Tiles that reach into the cells [start, end) of an axis: origins, first and last cells.

        The last one is exclusive.
        """
        cells = origins // LOW_RES_STRIDE
        first = np.maximum(cells, start)
        last = np.minimum(cells + self.plan.model.tile_size_px // LOW_RES_STRIDE, end)
        reach = first < last
        return origins[reach], first[reach], last[reach]

    def _has_tissue(self, top: Ints, left: Ints, bottom: Ints, right: Ints) -> NDArray[np.bool_]:
        """Whether rectangles of cells have tissue, for all at once."""
        side = self.plan.mask_px // LOW_RES_STRIDE
        top, left, bottom, right = top // side, left // side, -(-bottom // side), -(-right // side)
        sums = self._sums
        total: Ints = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        return total > 0
