"""A region put together from the squares of a grid that it reaches into."""

from collections.abc import Iterator
from typing import NamedTuple

Slices = tuple[slice, slice]
"""Of rows and of columns."""


class Square(NamedTuple):
    """A square of a grid, and what of it a region takes."""

    row: int
    column: int
    inside: Slices
    """The part of the square that lies in the region."""
    place: Slices
    """Where that part lies in the region."""


def squares_of(
    top: int, left: int, bottom: int, right: int, side: int, width: int | None = None
) -> Iterator[Square]:
    """The squares of a grid from (0, 0) on that a region reaches into, row by row.

    Args:
        top: first row of the region.
        left: first column.
        bottom: row after the last.
        right: column after the last.
        side: of the squares.
        width: of the squares, where they are not squares but `side` high.
    """
    width = width or side
    for row in range(top // side, -(-bottom // side)):
        inside_y, place_y = _part(row, side, top, bottom)
        for column in range(left // width, -(-right // width)):
            inside_x, place_x = _part(column, width, left, right)
            yield Square(row, column, (inside_y, inside_x), (place_y, place_x))


def _part(index: int, side: int, start: int, end: int) -> tuple[slice, slice]:
    first, last = max(start, index * side), min(end, (index + 1) * side)
    return slice(first - index * side, last - index * side), slice(first - start, last - start)
