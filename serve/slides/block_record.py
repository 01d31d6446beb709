"""What a block holds, in numbers: a slide's summary is added up from them."""

import numpy as np
from numpy.typing import NDArray

from serve.contract.strict import Strict
from serve.inference.summary import LOW_CONFIDENCE
from serve.slides.plan import Block

_VALUES = 256
_LOW = int(np.ceil(LOW_CONFIDENCE * 255))
_ROWS_AT_ONCE = 128
"""Bounds the memory: using it for the first time costs more than counting."""


class CellCounts(Strict):
    """Numbers per label, from 0 to the highest label that was found."""

    cells: tuple[int, ...]
    confidence_sums: tuple[int, ...]
    """Sum of the confidence bytes."""
    low_confidence_cells: tuple[int, ...]
    """Cells whose confidence is below `LOW_CONFIDENCE`."""


class BlockRecord(CellCounts):
    """What a block found, and how it was computed."""

    row: int
    column: int
    num_tiles: int
    num_reused: int = 0
    """Of these tiles, those whose answers were kept from an earlier block."""
    seconds: dict[str, float]
    """Busy time per stage."""
    host: str = ""
    """Machine that computed it."""
    peak_memory_mib: int = 0
    """Of the process that computed it, until then."""

    @property
    def block(self) -> Block:
        """Which one."""
        return Block(self.row, self.column)


def count_cells(labels: NDArray[np.uint8], confidence: NDArray[np.uint8]) -> CellCounts:
    """Count the cells of a block.

    Args:
        labels: (rows, columns) uint8.
        confidence: (rows, columns) uint8, 255 = 1.0.
    """
    # How many cells have each pair of label and confidence: all numbers follow from it.
    counts = np.zeros((_VALUES, _VALUES), np.int64)
    for top in range(0, len(labels), _ROWS_AT_ONCE):
        rows = slice(top, top + _ROWS_AT_ONCE)
        pairs = labels[rows].astype(np.uint16) * _VALUES + confidence[rows]
        counts += np.bincount(pairs.ravel(), minlength=counts.size).reshape(counts.shape)
    cells = counts.sum(axis=1)
    found = slice(int(np.flatnonzero(cells)[-1]) + 1)
    return CellCounts(
        cells=tuple(cells[found].tolist()),
        confidence_sums=tuple((counts @ np.arange(_VALUES))[found].tolist()),
        low_confidence_cells=tuple(counts[:, :_LOW].sum(axis=1)[found].tolist()),
    )
