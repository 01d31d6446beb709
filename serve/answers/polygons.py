"""A label image to polygons: exact, with holes, and sharing every edge with their neighbours.

Coordinates are of pixel edges, not of centres: pixel (x, y) is the square from (x, y) to
(x + 1, y + 1), as in QuPath and in the Digital Slide Archive. A region is what is connected
through sides of pixels. Each boundary between two regions has the same vertices on both sides, so
that the polygons are a coverage in the sense of GEOS, which simplifies a shared edge once.

Traced here with numpy: OpenCV's contours run through the centres of pixels and have to be widened
by half of one, which breaks shared edges; rasterio, which has GDAL's tracer, is 107 MB and leaves
out the vertices at which three regions meet. shapely builds and simplifies the polygons.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

from serve.answers.components import NOTHING, Components
from serve.answers.edges import Edges, Ints, Rings

_PART_EDGES = 100_000
"""Edges of the regions that are made into polygons at once, about."""


class Regions(NamedTuple):
    """The regions of a label image; each array has one entry per region."""

    polygons: NDArray[np.object_]
    """shapely polygons, valid, in pixels."""
    labels: NDArray[np.uint8]
    area_px: Ints
    """Pixels of the region, even if the polygon is simplified."""
    mean_confidence: NDArray[np.float64]
    """Mean probability of the label over the region's pixels, 0 to 1."""

    def selected(self, chosen: NDArray[np.bool_] | slice) -> "Regions":
        """Some of the regions."""
        return Regions._make(array[chosen] for array in self)


def join_parts(parts: Iterable[Regions]) -> Regions:
    """The regions of all parts."""
    nothing = np.zeros(0)
    none = Regions(nothing.astype(object), nothing.astype(np.uint8), nothing.astype(int), nothing)
    return Regions._make(map(np.concatenate, zip(none, *parts, strict=True)))


def trace_regions(
    labels: NDArray[np.uint8],
    confidence: NDArray[np.uint8],
    *,
    simplify_px: float = 0.0,
    min_area_px: int = 0,
    shown: Sequence[int] | None = None,
    is_part: bool = False,
) -> Iterator[Regions]:
    """Trace every region of a label image; some regions after the other become polygons.

    What cannot be traced is known when this returns, before the first polygon is made.

    Args:
        labels: (H, W) uint8; regions of 0 are traced like the others.
        confidence: (H, W) uint8, 255 = 1.0.
        simplify_px: how far to simplify: about the square root of the triangles that may be cut
            off (Visvalingam-Whyatt). Shared edges stay shared, the image's frame stays as it is,
            and rings keep their direction. All regions are then in memory at once.
        min_area_px: regions of fewer pixels are left out before anything is traced. What they leave
            inside of one other region is filled by it, if it has fewer pixels itself; elsewhere
            a gap is left.
        shown: the labels to trace; None: all.
        is_part: the labels are a part of a larger image. Small regions at its frame are then kept,
            since they may go on beyond it, and so are gaps beside them.

    Returns:
        Parts of the regions, which have some 100,000 edges each.

    Raises:
        ImageTooLargeError: what is to be traced has more corners than can be of use.
    """
    found = Components.of(labels)
    wanted = found.labels
    if min_area_px > 1:
        wanted = found.without_small(min_area_px, is_part=is_part)
    if shown is not None:
        wanted = np.where(np.isin(wanted, shown), wanted, np.uint8(NOTHING))
    if wanted is not found.labels:
        labels = found.paint(wanted)
    # Simplified with what is left out, since that shares edges too.
    kept = np.ones(labels.shape, bool) if simplify_px > 0 else labels != NOTHING
    tracing = _Tracing(Edges.of(labels, kept), wanted, found, confidence)
    return _simplified(tracing, simplify_px) if simplify_px > 0 else tracing.parts()


def _simplified(tracing: "_Tracing", simplify_px: float) -> Iterator[Regions]:
    regions = join_parts(tracing.parts())
    simple = shapely.coverage_simplify(regions.polygons, simplify_px, simplify_boundary=False)
    kept = regions.labels != NOTHING
    yield regions.selected(kept)._replace(polygons=shapely.orient_polygons(simple[kept]))


class _Tracing:
    """Rings that become polygons, each hole with the outer ring of its region.

    Args:
        edges: of the regions.
        labels: of the runs, as they are traced.
        found: the regions as they are in the image.
        confidence: (H, W) uint8.
    """

    def __init__(
        self,
        edges: Edges,
        labels: NDArray[np.uint8],
        found: Components,
        confidence: NDArray[np.uint8],
    ) -> None:
        self._edges, self._rings = edges, Rings.of(edges)
        rings = self._rings
        run = found.run_at(*edges.pixel_at_right(rings.edges[rings.first]))
        region = found.connected(labels)[run]  # as it is traced
        self._outer = np.flatnonzero(rings.is_outer)
        outer_of = np.full(len(labels), -1)
        outer_of[region[self._outer]] = self._outer  # a region has one
        self._parent = outer_of[region]
        holes = np.flatnonzero(~rings.is_outer)
        self._holes = holes[np.argsort(self._parent[holes], kind="stable")]
        """By the outer ring of their region."""
        run = run[self._outer]  # also where small ones in it are filled: never at its rim
        self._labels = labels[run]
        self._area = found.area_px()[found.component[run]]
        self._confidence = found.sums(confidence)[found.component[run]] / self._area / 255

    def parts(self) -> Iterator[Regions]:
        """The regions, some after the other, in the order of their outer rings."""
        rings, outer = self._rings, self._outer
        num_edges = np.bincount(self._parent, rings.lengths, len(rings.first))[outer]
        part_of = np.cumsum(num_edges) // _PART_EDGES
        limits = [*np.flatnonzero(np.diff(part_of, prepend=-1)).tolist(), len(outer)]
        for begin, end in zip(limits, limits[1:], strict=False):
            yield self._part(begin, end)

    def _part(self, begin: int, end: int) -> Regions:
        outer, parents = self._outer[begin:end], self._parent[self._holes]
        mine = slice(*np.searchsorted(parents, (outer[0], outer[-1] + 1)).tolist())
        holes, owner = self._holes[mine], np.searchsorted(outer, parents[mine])
        linear = self._linear_rings(np.concatenate([outer, holes]))
        of = np.concatenate([np.arange(len(outer)), owner])
        order = np.argsort(of, kind="stable")  # each outer ring, then its holes
        polygons = np.array(shapely.polygons(linear[order], indices=of[order]), dtype=object)
        place = slice(begin, end)
        return Regions(polygons, self._labels[place], self._area[place], self._confidence[place])

    def _linear_rings(self, rings: Ints) -> NDArray[np.object_]:
        lengths = self._rings.lengths[rings]
        ring_of = np.repeat(np.arange(len(rings)), lengths)
        begin = np.cumsum(lengths) - lengths
        places = np.arange(len(ring_of)) - begin[ring_of] + self._rings.first[rings][ring_of]
        starts = self._edges.start[self._rings.edges[places]]
        coordinates = np.stack([self._edges.x[starts], self._edges.y[starts]], axis=-1)
        found: NDArray[np.object_] = shapely.linearrings(coordinates, indices=ring_of)
        return found
