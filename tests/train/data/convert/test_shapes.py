"""Outlines and holes become labels of pixels."""

import numpy as np
import pytest

from train.data.convert.shapes import fill_shape

OUTLINE = (2, 2, 12, 12)


def box(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]], float)


@pytest.mark.parametrize(
    "holes",
    [
        [(4, 4, 8, 8)],
        [(4, 4, 8, 8), (6, 6, 10, 10)],  # they overlap
        [(8, 4, 15, 8)],  # beyond the outline
        [(-5, -5, 4, 20), (13, 13, 15, 15)],  # around an edge, and outside
        [(0, 0, 16, 16)],
    ],
)
def test_a_hole_takes_away_and_never_adds(holes: list[tuple[int, int, int, int]]):
    labels = np.zeros((16, 16), np.uint8)
    reached = fill_shape(labels, tuple(box(*edges) for edges in (OUTLINE, *holes)), 3)
    expected = np.zeros((16, 16), np.uint8)
    expected[2:12, 2:12] = 3
    for left, top, right, bottom in holes:
        expected[max(top, 0) : bottom, max(left, 0) : right] = 0
    np.testing.assert_array_equal(labels, expected)
    assert reached == bool(expected.any())


def test_an_outline_may_cross_itself_and_may_repeat_its_first_point():
    labels = np.zeros((8, 8), np.uint8)
    bow_tie = np.array([[0, 0], [8, 8], [8, 0], [0, 8], [0, 0]], float)
    fill_shape(labels, (bow_tie,), 1)
    rows, columns = np.mgrid[:8, :8]
    sides = (columns < rows) != (columns + rows > 7)
    centre = (columns == rows) | (columns + rows == 7)
    np.testing.assert_array_equal(labels[~centre], sides[~centre].astype(np.uint8))
