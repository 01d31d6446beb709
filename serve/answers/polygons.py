"""A label image to polygons: exact, with holes, and sharing every edge with their neighbours.

Coordinates are of pixel edges, not of centres: pixel (x, y) is the square from (x, y) to
(x + 1, y + 1), as in QuPath and in the Digital Slide Archive. A region is what is connected
through sides of pixels. Each boundary between two regions has the same vertices on both sides, so
that the polygons are a coverage in the sense of GEOS, which simplifies a shared edge once.

Traced here with numpy: OpenCV's contours run through the centres of pixels and have to be widened
by half of one, which breaks shared edges; rasterio, which has GDAL's tracer, is 107 MB and leaves
out the vertices at which three regions meet. shapely builds and simplifies the polygons.

Directions: 0 right, 1 down, 2 left, 3 up. An edge runs with its region at its right hand, so that
outer rings go clockwise on the screen and holes the other way round.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import shapely
from numpy.typing import NDArray

from serve.answers.components import NOTHING, Components
from serve.contract.errors import ImageTooLargeError

MAX_EDGES = 4_000_000
"""Most edges that are traced. A picture of noise has as many as pixels, which nobody can use."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Regions:
    """The regions of a label image; each array has one entry per region."""

    polygons: NDArray[np.object_]
    """shapely polygons, valid, in pixels."""
    labels: NDArray[np.uint8]
    area_px: Ints
    """Pixels of the region, even if the polygon is simplified."""
    mean_confidence: NDArray[np.float64]
    """Mean probability of the label over the region's pixels, 0 to 1."""


def trace_regions(
    labels: NDArray[np.uint8],
    confidence: NDArray[np.uint8],
    *,
    simplify_px: float = 0.0,
    min_area_px: int = 0,
    shown: Sequence[int] | None = None,
) -> Regions:
    """Trace every region of a label image.

    Args:
        labels: (H, W) uint8; regions of 0 are traced like the others.
        confidence: (H, W) uint8, 255 = 1.0.
        simplify_px: how far to simplify: about the square root of the triangles that may be cut
            off (Visvalingam-Whyatt). Shared edges stay shared, the image's frame stays as it is,
            and rings keep their direction.
        min_area_px: regions of fewer pixels are left out before anything is traced. What they leave
            inside of one other region is filled by it, if it has fewer pixels itself; elsewhere
            a gap is left.
        shown: the labels to trace; None: all.

    Raises:
        ImageTooLargeError: what is to be traced has more corners than can be of use.
    """
    found = Components.of(labels)
    wanted = found.labels
    if min_area_px > 1:
        wanted = found.without_small(min_area_px)
    if shown is not None:
        wanted = np.where(np.isin(wanted, shown), wanted, np.uint8(NOTHING))
    if wanted is not found.labels:
        labels = found.paint(wanted)
    edges = _Edges.of(labels)
    regions = _assemble(edges, _Rings.of(edges), labels, found, confidence)
    if simplify_px > 0:  # with what is left out, since that shares edges too
        simple = shapely.coverage_simplify(regions.polygons, simplify_px, simplify_boundary=False)
        regions = replace(regions, polygons=shapely.orient_polygons(simple))
    if wanted is not found.labels:
        regions = _select(regions, regions.labels != NOTHING)
    return regions


def select_labels(regions: Regions, labels: NDArray[np.integer]) -> Regions:
    """The regions of some labels only."""
    return _select(regions, np.isin(regions.labels, labels))


@dataclass(frozen=True)
class _Edges:
    """Directed edges from node to node; a node is where the boundary turns or branches."""

    shape: tuple[int, int]
    nodes: Ints
    """Flat indices of the nodes in the (H + 1, W + 1) lattice, ascending."""
    start: Ints
    """Index into `nodes`."""
    end: Ints
    direction: Ints
    walls: Ints
    """Flat (y, x) in (H, W + 1) of the pixel sides that are vertical boundary, ascending."""

    @classmethod
    def of(cls, labels: NDArray[np.uint8]) -> "_Edges":
        height, width = labels.shape
        # Where the label changes between rows and between columns; the frame is a change.
        across = np.ones((height + 1, width), bool)
        across[1:-1] = labels[1:] != labels[:-1]
        down = np.ones((height, width + 1), bool)
        down[:, 1:-1] = labels[:, 1:] != labels[:, :-1]
        vertical, horizontal = (np.zeros((2, height + 1, width + 1), bool) for _ in range(2))
        vertical[0, 1:], vertical[1, :-1] = down, down  # a side ends, begins at this vertex
        horizontal[0, :, 1:], horizontal[1, :, :-1] = across, across
        is_node = vertical.any(axis=0) & horizontal.any(axis=0)
        nodes = np.flatnonzero(is_node)
        if 4 * len(nodes) > MAX_EDGES:
            raise ImageTooLargeError(
                f"The outlines have {len(nodes)} corners, at most {MAX_EDGES // 4} can be traced. "
                "Leave out small regions with min_area_px, choose fewer classes, ask for /labels, "
                "or send a smaller image.",
                code="too_many_corners",
            )
        left, right = (np.flatnonzero(horizontal[side] & is_node) for side in (1, 0))
        top, bottom = (
            _by_column(np.flatnonzero(vertical[side] & is_node), width + 1) for side in (1, 0)
        )
        y, last_row = left // (width + 1), height
        below, above = y < last_row, y > 0
        x = top % (width + 1)
        leftward, rightward = x > 0, x < width  # the region left, right of a vertical side
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
            direction=np.repeat(np.arange(4), [len(part[0]) for part in parts]),
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


def _by_column(flat: Ints, width: int) -> Ints:
    """Lattice indices in the order of columns, so that starts and ends of sides pair up."""
    return flat[np.lexsort((flat // width, flat % width))]


@dataclass(frozen=True)
class _Rings:
    """Edges in walking order, ring after ring."""

    edges: Ints
    first: Ints
    """Where each ring begins in `edges`."""
    is_outer: NDArray[np.bool_]
    parent: Ints
    """The outer ring that each ring belongs to; an outer ring's own index."""

    @classmethod
    def of(cls, edges: _Edges) -> "_Rings":
        order, first = _walk(edges.successors().tolist(), edges.end.tolist())
        x, y = edges.position(edges.start[order])
        x_next, y_next = edges.position(edges.end[order])
        is_outer = np.add.reduceat(x * y_next - x_next * y, first) > 0  # twice its signed area
        parent = _parents(edges, order, first, is_outer, x)
        return cls(order, first, is_outer, parent)


def _walk(following: list[int], end: list[int]) -> tuple[Ints, Ints]:
    """Follow the edges; a walk that comes to a node again has closed a ring there.

    So every ring is simple. A region that touches itself in a corner has a hole there, which makes
    it a valid polygon.
    """
    seen = bytearray(len(following))
    order: list[int] = []
    first: list[int] = []
    for begin in range(len(following)):
        if seen[begin]:
            continue
        path: list[int] = []
        ends_at: dict[int, int] = {}  # node: edges of the path that lead to it
        edge = begin
        while not seen[edge]:
            seen[edge] = 1
            path.append(edge)
            node = end[edge]
            closed = ends_at.get(node)
            if closed is not None:
                first.append(len(order))
                order += path[closed:]
                for walked in path[closed:]:
                    ends_at.pop(end[walked], None)
                del path[closed:]
            ends_at[node] = len(path)
            edge = following[edge]
        if path:
            first.append(len(order))
            order += path
    return np.array(order), np.array(first)


def _parents(edges: _Edges, order: Ints, first: Ints, is_outer: NDArray[np.bool_], x: Ints) -> Ints:
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


def _assemble(
    edges: _Edges,
    rings: _Rings,
    labels: NDArray[np.uint8],
    found: Components,
    confidence: NDArray[np.uint8],
) -> Regions:
    """Rings to polygons, each hole with the outer ring that it belongs to."""
    starts = edges.start[rings.edges]
    coordinates = np.stack(edges.position(starts), axis=-1).astype(np.float64)
    ring_of = np.repeat(np.arange(len(rings.first)), _lengths(rings.first, rings.edges))
    linear = shapely.linearrings(coordinates, indices=ring_of)
    outer = np.flatnonzero(rings.is_outer)
    holes = np.flatnonzero(~rings.is_outer)
    holes = holes[np.argsort(rings.parent[holes], kind="stable")]
    polygons = np.array(shapely.polygons(linear[outer]), dtype=object)
    owner = np.searchsorted(outer, rings.parent[holes])
    with_holes, count = np.unique(owner, return_counts=True)
    for index, group in zip(with_holes, np.split(holes, np.cumsum(count)[:-1]), strict=False):
        polygons[index] = shapely.Polygon(linear[outer[index]], linear[group])
    row, column = _pixel_at_right(edges, rings.edges[rings.first[outer]])
    region = found.at(row, column)  # also where small ones in it are filled: never at its rim
    area = found.area_px()[region]
    mean_confidence = found.sums(confidence)[region] / area / 255
    return Regions(polygons, labels[row, column], area, mean_confidence)


def _pixel_at_right(edges: _Edges, edge: Ints) -> tuple[Ints, Ints]:
    """Row and column of the pixel at the right hand of each edge, at its start."""
    x, y = edges.position(edges.start[edge])
    direction = edges.direction[edge]
    return y - np.isin(direction, (2, 3)), x - np.isin(direction, (1, 2))


def _select(regions: Regions, kept: NDArray[np.bool_]) -> Regions:
    return Regions(
        regions.polygons[kept],
        regions.labels[kept],
        regions.area_px[kept],
        regions.mean_confidence[kept],
    )
