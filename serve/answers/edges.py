"""The edges between the regions of a label image, and the rings that they make.

Directions: 0 right, 1 down, 2 left, 3 up. An edge runs with its region at its right hand, so that
outer rings go clockwise on the screen and holes the other way round.
"""

from array import array
from dataclasses import dataclass, replace

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
    """At the start."""
    arrival: NDArray[np.int8]
    """Direction at the end."""
    twin: Ints
    """The same edge the other way round, with the region at the other side; -1: not traced."""

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
            arrival=direction,
            twin=_twins([used for used, _ in sides]),
        )

    def leaving(self) -> Ints:
        """(nodes, 4) the edge that leaves each node in each direction; -1: none."""
        found = np.full((len(self.x), 4), -1)
        found[self.start, self.direction] = np.arange(len(self.start))
        return found

    def successors(self) -> Ints:
        """The edge after each: the rightmost turn that exists keeps the region whole.

        This separates two pixels of a label that touch only in a corner.
        """
        leaving = self.leaving()
        following = np.full(len(self.start), -1)
        for turn in (1, 0, -1):
            candidate = leaving[self.end, (self.arrival + turn) % 4]
            following = np.where(following < 0, candidate, following)
        assert (following >= 0).all()
        return following

    def selected(self, kept: Bools) -> "Edges":
        """Some of the edges; the nodes keep their numbers."""
        number = np.where(kept, np.cumsum(kept) - 1, -1)
        twin = self.twin[kept]
        return replace(
            self,
            start=self.start[kept],
            end=self.end[kept],
            direction=self.direction[kept],
            arrival=self.arrival[kept],
            twin=np.where(twin >= 0, number[twin], -1),
        )

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


def _twins(used: list[Bools]) -> Ints:
    """The number of the opposite of each edge, given which sides are edges in each direction."""
    numbers, count = [], 0
    for sides in used:
        numbers.append(np.where(sides, np.cumsum(sides) - 1 + count, -1))
        count += int(np.count_nonzero(sides))
    return np.concatenate([numbers[(i + 2) % 4][sides] for i, sides in enumerate(used)])


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
        order, first = _walk(edges.successors(), edges.end, edges.is_crossing[edges.end])
        start, end = edges.start[order], edges.end[order]
        x, y = edges.x, edges.y
        double_area = np.add.reduceat(x[start] * y[end] - x[end] * y[start], first)
        return cls(order, first, double_area > 0)

    @property
    def lengths(self) -> Ints:
        """Edges of each ring."""
        return np.diff(self.first, append=len(self.edges))


def _walk(successors: Ints, ends: Ints, to_crossing: Bools) -> tuple[Ints, Ints]:
    """Follow the edges; a walk that comes to a node again has closed a ring there.

    So every ring is simple. A region that touches itself in a corner has a hole there, which makes
    it a valid polygon. Only at a crossing can a walk come to a node again.
    """
    following, end = successors.data, ends.data  # lists would be five times as large
    looks = to_crossing.tobytes()
    seen = bytearray(len(following))
    order: array[int] = array("q")
    first: array[int] = array("q")
    for begin in range(len(following)):
        if seen[begin]:
            continue
        path: list[int] = []
        ends_at: dict[int, int] = {}  # node: edges of the path that lead to it
        edge = begin
        while not seen[edge]:
            seen[edge] = 1
            path.append(edge)
            if looks[edge]:
                node = end[edge]
                closed = ends_at.get(node)
                if closed is not None:
                    first.append(len(order))
                    order.extend(path[closed:])
                    for walked in path[closed:]:
                        ends_at.pop(end[walked], None)
                    del path[closed:]
                ends_at[node] = len(path)
            edge = following[edge]
        if path:
            first.append(len(order))
            order.extend(path)
    return np.array(order, np.int64), np.array(first, np.int64)
