"""What a block holds, in numbers per label."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.inference.summary import LOW_CONFIDENCE

_VALUES = 256
_LOW = int(np.ceil(LOW_CONFIDENCE * 255))
_ROWS_AT_ONCE = 128
"""Bounds the memory: using it for the first time costs more than counting."""


class CellCounts(NamedTuple):
    """Numbers per label, from 0 to the highest label that was found."""

    cells: tuple[int, ...]
    confidence_sums: tuple[int, ...]
    """Sum of the confidence bytes."""
    low_confidence_cells: tuple[int, ...]
    """Cells whose confidence is below `LOW_CONFIDENCE`."""


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
        tuple(cells[found].tolist()),
        tuple((counts @ np.arange(_VALUES))[found].tolist()),
        tuple(counts[:, :_LOW].sum(axis=1)[found].tolist()),
    )
