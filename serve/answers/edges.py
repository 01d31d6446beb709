"""The edges between the regions of a label image, and the rings that they make.

Directions: 0 right, 1 down, 2 left, 3 up. An edge runs with its region at its right hand, so that
outer rings go clockwise on the screen and holes the other way round.
"""

from array import array
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
    nodes: Ints
    """Flat indices of the nodes in the (H + 1, W + 1) lattice, ascending."""
    start: Ints
    """Index into `nodes`."""
    end: Ints
    direction: NDArray[np.int8]
    is_crossing: Bools
    """Of each node: four sides meet there, so that a ring may come to it twice."""
    walls: Ints
    """Flat (y, x) in (H, W + 1) of the pixel sides that are vertical boundary, ascending."""

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
        # Where the label changes between rows and between columns; the frame is a change.
        across = np.ones((height + 1, width), bool)
        across[1:-1] = labels[1:] != labels[:-1]
        down = np.ones((height, width + 1), bool)
        down[:, 1:-1] = labels[:, 1:] != labels[:, :-1]
        is_node = _nodes(across, down)
        _check_number(across, down, is_node, kept)
        nodes = np.flatnonzero(is_node)
        y, x = np.divmod(np.flatnonzero(across & is_node[:, :-1]), width)
        left = _vertices(y, x, width)
        below, above = _is_kept(kept, y, x), _is_kept(kept, y - 1, x)
        y, x = np.divmod(np.flatnonzero(across & is_node[:, 1:]), width)
        right = _vertices(y, x + 1, width)
        # By columns, so that the tops and the bottoms of sides pair up.
        x, y = np.divmod(np.flatnonzero((down & is_node[:-1]).T), height)
        top = _vertices(y, x, width)
        leftward, rightward = _is_kept(kept, y, x - 1), _is_kept(kept, y, x)
        x, y = np.divmod(np.flatnonzero((down & is_node[1:]).T), height)
        bottom = _vertices(y + 1, x, width)
        parts = (
            (left[below], right[below]),
            (top[leftward], bottom[leftward]),
            (right[above], left[above]),
            (bottom[rightward], top[rightward]),
        )
        start, end = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
        return cls(
            shape=(height, width),
            nodes=nodes,
            start=np.searchsorted(nodes, start),
            end=np.searchsorted(nodes, end),
            direction=np.repeat(np.arange(4, dtype=np.int8), [len(part[0]) for part in parts]),
            is_crossing=_crossings(across, down)[is_node],
            walls=np.flatnonzero(down),
        )

    def successors(self) -> Ints:
        """The edge after each: the rightmost turn that exists keeps the region whole.

        This separates two pixels of a label that touch only in a corner.
        """
        leaving = np.full((len(self.nodes), 4), -1)
        leaving[self.start, self.direction] = np.arange(len(self.start))
        following = np.full(len(self.start), -1)
        for turn in (1, 0, -1):
            candidate = leaving[self.end, (self.direction + turn) % 4]
            following = np.where(following < 0, candidate, following)
        assert (following >= 0).all()
        return following

    def position(self, node: Ints) -> tuple[Ints, Ints]:
        """The (x, y) of nodes."""
        y, x = np.divmod(self.nodes[node], self.shape[1] + 1)
        return x, y

    def pixel_at_right(self, edge: Ints) -> tuple[Ints, Ints]:
        """Row and column of the pixel at the right hand of each edge, at its start."""
        x, y = self.position(self.start[edge])
        direction = self.direction[edge]
        return y - np.isin(direction, (2, 3)), x - np.isin(direction, (1, 2))


def _nodes(across: Bools, down: Bools) -> Bools:
    """The (H + 1, W + 1) vertices at which horizontal and vertical sides meet."""
    height, width = down.shape[0], across.shape[1]
    vertical, horizontal = (np.zeros((height + 1, width + 1), bool) for _ in range(2))
    vertical[1:] |= down
    vertical[:-1] |= down
    horizontal[:, 1:] |= across
    horizontal[:, :-1] |= across
    vertical &= horizontal
    return vertical


def _crossings(across: Bools, down: Bools) -> Bools:
    """The (H + 1, W + 1) vertices at which four sides meet."""
    found = np.zeros((down.shape[0] + 1, across.shape[1] + 1), bool)
    inner = found[1:-1, 1:-1]
    np.logical_and(down[:-1, 1:-1], down[1:, 1:-1], out=inner)
    inner &= across[1:-1, :-1]
    inner &= across[1:-1, 1:]
    return found


def _check_number(across: Bools, down: Bools, is_node: Bools, kept: Bools) -> None:
    """Count the edges, one by one of the regions on both sides, and refuse too many."""
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


def _vertices(y: Ints, x: Ints, width: int) -> Ints:
    return y * (width + 1) + x


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
    parent: Ints
    """The outer ring that each ring belongs to; an outer ring's own index."""

    @classmethod
    def of(cls, edges: Edges) -> "Rings":
        """Follow the edges around."""
        if not len(edges.start):
            nothing = np.zeros(0, np.int64)
            return cls(nothing, nothing, np.zeros(0, bool), nothing)
        order, first = _walk(edges.successors(), edges.end, edges.is_crossing[edges.end])
        x, y = edges.position(edges.start[order])
        x_next, y_next = edges.position(edges.end[order])
        is_outer = np.add.reduceat(x * y_next - x_next * y, first) > 0  # twice its signed area
        parent = _parents(edges, order, first, is_outer, x)
        return cls(order, first, is_outer, parent)

    @property
    def lengths(self) -> Ints:
        """Edges of each ring."""
        return _lengths(self.first, self.edges)


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


def _parents(edges: Edges, order: Ints, first: Ints, is_outer: Bools, x: Ints) -> Ints:
    """The outer ring around each hole, by looking left from the hole's leftmost side.

    The next wall there belongs to the same region, and to a ring that reaches further left: the
    outer ring, or another hole whose own wall is looked up in turn.
    """
    width = edges.shape[1]
    ring_of = np.empty(len(order), np.int64)
    ring_of[order] = np.repeat(np.arange(len(first)), _lengths(first, order))
    upward = np.flatnonzero(edges.direction == 3)  # walls with the region at their right side
    wall_x, wall_y = edges.position(edges.end[upward])
    by_place = np.lexsort((wall_y, wall_x))
    keys = (wall_x * (edges.shape[0] + 1) + wall_y)[by_place]

    holes = np.flatnonzero(~is_outer)
    down = np.where(edges.direction[order] == 1, x, width + 1)  # a hole's left sides go down
    leftmost = np.minimum.reduceat(down, first)[holes]
    wanted = np.full(len(first), -1)
    wanted[holes] = leftmost
    at = np.flatnonzero(down == np.repeat(wanted, _lengths(first, order)))
    at = at[np.unique(ring_of[order[at]], return_index=True)[1]]  # one for each hole
    hole_x, hole_y = edges.position(edges.start[order[at]])
    wall = edges.walls[np.searchsorted(edges.walls, hole_y * (width + 1) + hole_x) - 1]
    key = wall % (width + 1) * (edges.shape[0] + 1) + wall // (width + 1)
    hit = upward[by_place[np.searchsorted(keys, key, side="right") - 1]]
    parent = np.arange(len(first))
    parent[holes] = ring_of[hit]
    while not is_outer[parent].all():
        parent = parent[parent]
    return parent


def _lengths(first: Ints, order: Ints) -> Ints:
    return np.diff([*first, len(order)])
