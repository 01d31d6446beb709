"""Fewer vertices for the edges between regions, each shared edge simplified once.

Visvalingam and Whyatt's method (1993): the vertex that spans the smallest triangle with its two
neighbours goes first, as long as that triangle is small. Here all vertices whose triangle is
smaller than their neighbours' go in the same pass, which is our choice: a pass is a few calls of
numpy, and GEOS, which takes one vertex after the other, needs several times as long.

Regions stay what they are. A vertex stays where three or more regions meet and at the image's
frame. It also stays where another vertex lies in its triangle, or where the new edge is there
already. An edge that crossed the new one would have to cross one of the two old ones, or to end
in the triangle. So no two edges cross, and no ring loses its area.
"""

from dataclasses import dataclass, replace

import numpy as np

from serve.answers.edges import Bools, Edges, Ints

_NEVER = np.iinfo(np.int64).max
_MOST_DOUBLE_AREA = 2**26
_SIDE_BITS, _HASH_BITS = 18, 36
_HASH = 0x9E3779B97
"""Vertices with triangles of one size go in an order without a direction, so that few passes are
needed: an odd factor gives each place another number (Knuth's multiplicative hash)."""


def simplify_edges(edges: Edges, tolerance: float) -> Edges:
    """Leave out vertices.

    Args:
        edges: of all regions of the image: every side inside of it is there in both directions.
        tolerance: in pixels. Triangles up to its square are cut off, and none above 2**25.
    """
    work = _Chains.of(edges, tolerance)
    work.rate(work.movable)
    while len(vertices := work.smallest()):
        work.rate(work.remove(vertices))
    return work.result(edges)


@dataclass
class _Chains:
    """The edges as chains of vertices, which get shorter; each array but `movable` changes."""

    x: Ints
    y: Ints
    width: int
    places: Ints
    """Of each vertex: its place in the image, ascending."""
    leaving: Ints
    """(N, 4) the edges that leave each vertex; -1: none."""
    one: Ints
    """The first of the two edges that leave each vertex that may go; -1: it may not."""
    other: Ints
    """The second."""
    end: Ints
    """Of each edge."""
    twin: Ints
    """Of each edge: the same edge the other way round."""
    is_left: Bools
    """Of each vertex: it has not gone."""
    mixed: Ints
    """Of each vertex: its number among those with triangles of one size."""
    rank: Ints
    """Of each vertex: the lower, the sooner it goes; `_NEVER` if it stays as things are."""
    movable: Ints
    """Vertices that may go: two edges meet there, inside of the image."""
    most: float
    """Twice the area of the largest triangle that is cut off."""

    @classmethod
    def of(cls, edges: Edges, tolerance: float) -> "_Chains":
        leaving = edges.leaving()
        y, x = edges.y, edges.x
        height, width = edges.shape
        inside = (y > 0) & (y < height) & (x > 0) & (x < width)
        has = leaving >= 0
        movable = np.flatnonzero((np.count_nonzero(has, axis=1) == 2) & inside)
        one, other = np.full((2, len(x)), -1)
        one[movable], other[movable] = leaving[movable][has[movable]].reshape(-1, 2).T
        first = movable[0] if len(movable) else 0  # the order does not depend on what is around
        place = ((y - y[first]) << _SIDE_BITS) + x - x[first]
        return cls(
            x=x,
            y=y,
            width=width,
            places=y * (width + 1) + x,
            leaving=leaving,
            one=one,
            other=other,
            mixed=(place * _HASH) & (2**_HASH_BITS - 1),
            end=edges.end.copy(),
            twin=edges.twin.copy(),
            is_left=np.ones(len(x), bool),
            rank=np.full(len(x), _NEVER),
            movable=movable,
            most=min(2 * tolerance**2, _MOST_DOUBLE_AREA),
        )

    def neighbours(self, vertices: Ints) -> tuple[Ints, Ints]:
        """The vertices before and after each."""
        return self.end[self.one[vertices]], self.end[self.other[vertices]]

    def rate(self, vertices: Ints) -> None:
        """Rank vertices by their triangles."""
        double = self._double_area(vertices, *self.neighbours(vertices))
        rank = (double << _HASH_BITS) + self.mixed[vertices]
        self.rank[vertices] = np.where(double <= self.most, rank, _NEVER)

    def smallest(self) -> Ints:
        """The vertices that go before both of their neighbours."""
        found = np.flatnonzero(self.rank != _NEVER)
        before, after = self.neighbours(found)
        rank = self.rank[found]
        return found[(rank < self.rank[before]) & (rank < self.rank[after])]

    def remove(self, vertices: Ints) -> Ints:
        """Remove vertices of which no two are neighbours, but for those that have to stay.

        Returns:
            The vertices whose triangle has changed.
        """
        before, after = self.neighbours(vertices)
        stays = self._is_joined(before, after) | self._is_occupied(vertices, before, after)
        self.rank[vertices[stays]] = _NEVER  # until a neighbour goes
        vertices, before, after = (part[~stays] for part in (vertices, before, after))
        # Two that would leave the same edge: the other one waits for the next pass.
        edge = np.minimum(before, after) * len(self.x) + np.maximum(before, after)
        first = np.unique(edge, return_index=True)[1]
        vertices, before, after = vertices[first], before[first], after[first]
        from_before = self.twin[self.one[vertices]]
        from_after = self.twin[self.other[vertices]]
        self.end[from_before], self.end[from_after] = after, before
        self.twin[from_before], self.twin[from_after] = from_after, from_before
        self.is_left[vertices] = False
        self.rank[vertices] = _NEVER
        is_changed = np.zeros(len(self.x), bool)
        is_changed[before] = is_changed[after] = True
        changed = np.flatnonzero(is_changed)
        return changed[self.one[changed] >= 0]

    def result(self, edges: Edges) -> Edges:
        """The edges that are left; vertices that have gone are no edge's."""
        last = np.where(self.twin >= 0, edges.twin[self.twin], np.arange(len(self.end)))
        kept = self.is_left[edges.start]
        return replace(edges, end=self.end, twin=self.twin, arrival=edges.arrival[last]).selected(
            kept
        )

    def _double_area(self, vertices: Ints, before: Ints, after: Ints) -> Ints:
        x, y = self.x[vertices], self.y[vertices]
        found: Ints = np.abs(
            (self.x[before] - x) * (self.y[after] - y) - (self.x[after] - x) * (self.y[before] - y)
        )
        return found

    def _is_joined(self, one: Ints, other: Ints) -> Bools:
        """Whether there is an edge between two vertices."""
        found = np.zeros(len(one), bool)
        stays = np.ones(len(one), bool)
        for start, end in ((one, other), (other, one)):
            may_go = self.one[start] >= 0  # else these are not its edges
            before, after = self.neighbours(start)
            found |= may_go & ((before == end) | (after == end))
            stays &= ~may_go
        asked = np.flatnonzero(stays)
        for start, end in ((one[asked], other[asked]), (other[asked], one[asked])):
            for edge in self.leaving[start].T:  # at the frame, only one of both has the edge
                found[asked] |= (edge >= 0) & (self.end[edge] == end)
        return found

    def _is_occupied(self, vertices: Ints, before: Ints, after: Ints) -> Bools:
        """Whether a triangle has another vertex in it or on its new side."""
        corners = np.stack([vertices, before, after])
        double = self._double_area(vertices, before, after)
        found = np.zeros(len(vertices), bool)
        # Half a pixel holds no place for a vertex, and on the old sides of a flat one is none.
        asked = np.flatnonzero(double > 1)
        places = _places(self.x[corners[:, asked]], self.y[corners[:, asked]], double[asked])
        asked = asked[places > 0]
        if len(asked):
            x, y = self.x[corners[:, asked]], self.y[corners[:, asked]]
            found[asked] = self._count(x, y) > len(corners)
        return found

    def _count(self, x: Ints, y: Ints) -> Ints:
        """How many vertices lie in each triangle and on its sides; of (3, M) corners."""
        order = np.argsort(y, axis=0)
        x, y = np.take_along_axis(x, order, axis=0), np.take_along_axis(y, order, axis=0)
        heights = y[2] - y[0] + 1
        first = np.cumsum(heights) - heights
        of = np.repeat(np.arange(len(heights)), heights)
        row = np.arange(len(of)) - first[of] + y[0][of]
        x, y = x[:, of], y[:, of]
        upper = row <= y[1]  # where the long side faces the upper one of the others
        lines = (
            _crossing(row, x[0], y[0], x[2], y[2]),
            _crossing(
                row,
                np.where(upper, x[1], x[2]),
                np.where(upper, y[1], y[2]),
                np.where(upper, x[0], x[1]),
                np.where(upper, y[0], y[1]),
            ),
        )
        start = np.minimum(lines[0][1], lines[1][1])
        stop = np.maximum(lines[0][0], lines[1][0])
        left = self.places[self.is_left]
        width = self.width + 1
        in_row = np.searchsorted(left, row * width + stop, side="right") - np.searchsorted(
            left, row * width + start
        )
        counts: Ints = np.add.reduceat(in_row, first)
        return counts


def _places(x: Ints, y: Ints, double: Ints) -> Ints:
    """How many whole coordinates lie in triangles and on their last sides, by Pick's theorem.

    Args:
        x: (3, M) of the corners.
        y: (3, M).
        double: twice the triangles' areas.
    """
    one, other, last = (np.gcd(x[a] - x[b], y[a] - y[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    inside: Ints = (double - one - other - last + 2) // 2
    found: Ints = inside + last - 1
    return found


def _crossing(row: Ints, x: Ints, y: Ints, x_end: Ints, y_end: Ints) -> tuple[Ints, Ints]:
    """Where lines cross rows: rounded down and up. A line along its row counts at its start."""
    height = y_end - y
    part = (x_end - x) * (row - y)
    height = np.where(height == 0, 1, height)
    return x + part // height, x - (-part // height)
