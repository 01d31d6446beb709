"""Footprints: the physical squares that views show, and which patches of one lie in another.

Everything is in um in the frame of the slide, rows before columns, pixel centres at halves.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Kind = TypeVar("Kind", bound=np.generic)

NUM_DIHEDRAL_MOVES = 8
"""Four quarter turns, each with and without a flip."""


@dataclass(frozen=True)
class Footprint:
    """The square of a slide that a view shows."""

    y_um: float
    """Upper edge."""
    x_um: float
    """Left edge."""
    side_um: float
    """Height and width."""

    def contains(self, other: "Footprint") -> bool:
        """Whether the other square lies inside this one."""
        return (
            self.y_um <= other.y_um
            and self.x_um <= other.x_um
            and other.y_um + other.side_um <= self.y_um + self.side_um
            and other.x_um + other.side_um <= self.x_um + self.side_um
        )


def footprint_weights(
    coarse: Footprint, fine: Footprint, num_cells: int, move: int = 0
) -> NDArray[np.float32]:
    """Share of a fine view's footprint in each patch of a coarse view.

    Args:
        coarse: the footprint that the coarse view shows.
        fine: the footprint of the fine view.
        num_cells: patches of the coarse view along a side.
        move: the dihedral move that the coarse view has been through, 0..7.

    Returns:
        (num_cells, num_cells) float32, which sums to 1.

    Raises:
        ValueError: the fine footprint lies outside the coarse one.
    """
    rows = _overlaps(coarse.y_um, fine.y_um, coarse.side_um, fine.side_um, num_cells)
    columns = _overlaps(coarse.x_um, fine.x_um, coarse.side_um, fine.side_um, num_cells)
    weights = np.outer(rows, columns)
    total = weights.sum()
    if total <= 0:
        raise ValueError(f"the fine footprint {fine} lies outside the coarse one {coarse}")
    return move_dihedrally((weights / total).astype(np.float32), move)


def _overlaps(
    coarse_um: float, fine_um: float, coarse_side_um: float, fine_side_um: float, num_cells: int
) -> NDArray[np.float64]:
    """Length of the fine interval in each cell of the coarse one: (num_cells,) um."""
    edges = coarse_um + np.linspace(0, coarse_side_um, num_cells + 1)
    upper = np.minimum(edges[1:], fine_um + fine_side_um)
    lower = np.maximum(edges[:-1], fine_um)
    return np.asarray(np.maximum(upper - lower, 0.0), np.float64)


def move_dihedrally(picture: NDArray[Kind], move: int) -> NDArray[Kind]:
    """Turn a picture by `move % 4` quarters, after a left-right flip for moves from 4.

    Args:
        picture: (H, W) or (H, W, C).
        move: 0..7; 0 leaves it as it is.
    """
    flipped = picture[:, ::-1] if move >= 4 else picture
    return np.ascontiguousarray(np.rot90(flipped, move % 4))
