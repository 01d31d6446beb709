import numpy as np
import pytest

from train.pretraining.footprints import (
    NUM_DIHEDRAL_MOVES,
    Footprint,
    footprint_weights,
    move_dihedrally,
)

COARSE = Footprint(10.0, 20.0, 96.0)
FINE = Footprint(33.7, 41.9, 24.0)
NUM_CELLS = 6


def _brute_force(coarse: Footprint, fine: Footprint, num_cells: int) -> np.ndarray:
    """Share of points of the fine footprint in each cell, from a raster of 400 x 400 points."""
    at = (np.arange(400) + 0.5) / 400
    rows = fine.y_um + at * fine.side_um - coarse.y_um
    columns = fine.x_um + at * fine.side_um - coarse.x_um
    cell = coarse.side_um / num_cells
    counts = np.zeros((num_cells, num_cells))
    np.add.at(counts, np.ix_((rows // cell).astype(int), (columns // cell).astype(int)), 1)
    return counts / counts.sum()


def test_weights_equal_a_raster_overlap_and_sum_to_one() -> None:
    weights = footprint_weights(COARSE, FINE, NUM_CELLS)
    assert weights.sum() == pytest.approx(1)
    assert weights == pytest.approx(_brute_force(COARSE, FINE, NUM_CELLS), abs=2e-2)
    assert (weights > 0).sum() == (_brute_force(COARSE, FINE, NUM_CELLS) > 0).sum()


def test_a_fine_view_of_one_patch_lies_in_that_patch() -> None:
    one = Footprint(10.0 + 2 * 16, 20.0 + 4 * 16, 16.0)
    weights = footprint_weights(COARSE, one, NUM_CELLS)
    assert weights[2, 4] == pytest.approx(1)


@pytest.mark.parametrize("move", range(NUM_DIHEDRAL_MOVES))
def test_weights_follow_the_picture_through_every_move(move: int) -> None:
    picture = footprint_weights(COARSE, FINE, NUM_CELLS)
    moved = footprint_weights(COARSE, FINE, NUM_CELLS, move)
    assert np.array_equal(moved, move_dihedrally(picture, move))


def test_the_eight_moves_differ() -> None:
    picture = np.arange(9).reshape(3, 3)
    moved = {move_dihedrally(picture, move).tobytes() for move in range(NUM_DIHEDRAL_MOVES)}
    assert len(moved) == NUM_DIHEDRAL_MOVES


def test_a_footprint_outside_is_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        footprint_weights(COARSE, Footprint(500.0, 500.0, 24.0), NUM_CELLS)
