"""The edges between the regions of a label image, and the rings that they make.

Directions: 0 right, 1 down, 2 left, 3 up. An edge runs with its region at its right hand, so that
outer rings go clockwise on the screen and holes the other way round.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import ImageTooLargeError

MAX_EDGES = 16_000_000
"""Most edges that are traced: bounds the memory to about 2 GB, and the time to a minute."""

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Edges:
    """Directed edges from node to node; a node is where the boundary turns or branches."""

    shape: tuple[int, int]
    x: Ints
    """Of each node, 0 to W; in the order of the rows."""
    y: Ints
    is_crossing: Bools
    """Of each node: four sides meet there, so that a ring may come to it twice."""
    start: Ints
    """Number of the node."""
    end: Ints
    direction: NDArray[np.int8]

    @classmethod
    def of(cls, labels: NDArray[np.uint8], kept: Bools) -> "Edges":
        """The edges of the regions that are kept.

        Args:
            labels: (H, W).
            kept: (H, W), whether the pixel's region is traced.

        Raises:
            ImageTooLargeError: there are too many of them, which is known before they are listed.
        """
        height, width = labels.shape
        # Where the label changes between rows and between columns; the frame is a change. With
        # one more at both ends of each row, or column, where no side is.
        across = np.zeros((height + 1, width + 2), bool)
        across[:, 1:-1] = True
        across[1:-1, 1:-1] = labels[1:] != labels[:-1]
        down = np.zeros((height + 2, width + 1), bool)
        down[1:-1] = True
        down[1:-1, 1:-1] = labels[:, 1:] != labels[:, :-1]
        is_node = (across[:, 1:] | across[:, :-1]) & (down[1:] | down[:-1])
        _check_number(across, down, is_node, kept)
        y, x = np.divmod(np.flatnonzero(is_node), width + 1)
        # Both ends of the horizontal sides in the order of the rows, of the others of the columns.
        by_column = np.argsort(x.astype(np.min_scalar_type(width)), kind="stable")
        right, left = across[y, x + 1], across[y, x]
        below, above = down[y + 1, x], down[y, x]
        ends = (
            (np.flatnonzero(right), np.flatnonzero(left)),
            (by_column[below[by_column]], by_column[above[by_column]]),
        )
        sides = (
            (_is_kept(kept, y[ends[0][0]], x[ends[0][0]]), ends[0]),
            (_is_kept(kept, y[ends[1][0]], x[ends[1][0]] - 1), ends[1]),
            (_is_kept(kept, y[ends[0][0]] - 1, x[ends[0][0]]), ends[0][::-1]),
            (_is_kept(kept, y[ends[1][0]], x[ends[1][0]]), ends[1][::-1]),
        )
        start, end = (np.concatenate([nodes[i][used] for used, nodes in sides]) for i in (0, 1))
        direction = np.repeat(
            np.arange(4, dtype=np.int8), [np.count_nonzero(used) for used, _ in sides]
        )
        return cls(
            shape=(height, width),
            x=x,
            y=y,
            is_crossing=right & left & below & above,
            start=start,
            end=end,
            direction=direction,
        )

    def successors(self) -> Ints:
        """The edge after each: the rightmost turn that exists keeps the region whole.

        This separates two pixels of a label that touch only in a corner.
        """
        leaving = np.full((len(self.x), 4), -1)
        leaving[self.start, self.direction] = np.arange(len(self.start))
        following = np.full(len(self.start), -1)
        for turn in (1, 0, -1):
            candidate = leaving[self.end, (self.direction + turn) % 4]
            following = np.where(following < 0, candidate, following)
        assert (following >= 0).all()
        return following

    def pixel_at_right(self, edge: Ints) -> tuple[Ints, Ints]:
        """Row and column of the pixel at the right hand of each edge, at its start."""
        node, direction = self.start[edge], self.direction[edge]
        row = self.y[node] - (direction >= 2)
        return row, self.x[node] - ((direction == 1) | (direction == 2))


def _check_number(across: Bools, down: Bools, is_node: Bools, kept: Bools) -> None:
    """Count the edges, one by one of the regions on both sides, and refuse too many."""
    across, down = across[:, 1:-1], down[1:-1]
    edges = sum(
        int(np.count_nonzero(side & begins & kept))
        for side, begins in (
            (across[:-1], is_node[:-1, :-1]),  # the region below a horizontal side
            (across[1:], is_node[1:, :-1]),  # above it
            (down[:, :-1], is_node[:-1, :-1]),  # at the right of a vertical side
            (down[:, 1:], is_node[:-1, 1:]),  # at its left
        )
    )
    if edges > MAX_EDGES:
        raise ImageTooLargeError(
            f"The outlines have {edges} edges, at most {MAX_EDGES} can be traced. Leave out small "
            "regions with min_area_px, choose fewer classes, ask for /labels, or send a smaller "
            "image.",
            code="too_many_corners",
        )


def _is_kept(kept: Bools, y: Ints, x: Ints) -> Bools:
    """Whether the pixels are kept; those beyond the frame are not."""
    height, width = kept.shape
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    found: Bools = inside & kept[y.clip(0, height - 1), x.clip(0, width - 1)]
    return found


@dataclass(frozen=True)
class Rings:
    """Edges in walking order, ring after ring."""

    edges: Ints
    first: Ints
    """Where each ring begins in `edges`."""
    is_outer: Bools

    @classmethod
    def of(cls, edges: Edges) -> "Rings":
        """Follow the edges around."""
        if not len(edges.start):
            nothing = np.zeros(0, np.int64)
            return cls(nothing, nothing, np.zeros(0, bool))
        following = _split(edges.successors(), edges.end, edges.is_crossing)
        order, first = _in_order(following, _lowest(following))
        start, end = edges.start[order], edges.end[order]
        x, y = edges.x, edges.y
        double_area = np.add.reduceat(x[start] * y[end] - x[end] * y[start], first)
        return cls(order, first, double_area > 0)

    @property
    def lengths(self) -> Ints:
        """Edges of each ring."""
        return np.diff(self.first, append=len(self.edges))


def _lowest(following: Ints) -> Ints:
    """The lowest edge of the ring that each edge is on, given the edge after each.

    Each round looks twice as far ahead as the one before. Different edges that see as far as
    before see all of their ring.
    """
    lowest = np.arange(len(following))
    while not np.array_equal(further := np.minimum(lowest, lowest[following]), lowest):
        lowest, following = further, following[following]
    return lowest


def _split(following: Ints, end: Ints, is_crossing: Bools) -> Ints:
    """Let a ring that comes to a node twice be two rings, so that every ring is simple.

    A region that touches itself in a corner has a hole there, which makes it a valid polygon.
    Where a ring touches itself in several corners, it can be split in each by itself: seen from
    the region, the two visits to one corner never lie on both sides of those to another.
    """
    ring = _lowest(following)
    arriving = np.flatnonzero(is_crossing[end])
    arriving = arriving[np.lexsort((ring[arriving], end[arriving]))]
    one, other = arriving[:-1], arriving[1:]
    twice = (end[one] == end[other]) & (ring[one] == ring[other])
    one, other = one[twice], other[twice]
    found = following.copy()
    found[one], found[other] = following[other], following[one]
    return found


def _in_order(following: Ints, lowest: Ints) -> tuple[Ints, Ints]:
    """All edges ring by ring, each from its lowest edge on, and where each ring begins."""
    edges = np.arange(len(following))
    is_last = following == lowest
    further, left = np.where(is_last, edges, following), (~is_last).astype(np.int64)
    while not np.array_equal(twice := further[further], further):
        left += left[further]
        further = twice
    rings = np.flatnonzero(lowest == edges)
    ends = np.cumsum(np.bincount(lowest, minlength=len(edges))[rings])
    end_of = np.empty(len(edges), np.int64)
    end_of[rings] = ends
    order = np.empty(len(edges), np.int64)
    order[end_of[lowest] - 1 - left] = edges
    return order, np.concatenate([[0], ends[:-1]])
