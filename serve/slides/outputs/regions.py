"""The regions of a whole slide, traced block by block and joined where blocks meet.

A region that lies within one block is handed out at once. Those that touch a block's edge are kept:
of one label, they are one region where they share some length of that edge, and their union is
exact. Regions that are too small are left out then. What they leave inside of one other region is
filled by it, as long as it is small, too.

Memory grows with the outlines' vertices: `OutputOptions.max_vertices`, or what is left after the
last attempt to simplify more.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import shapely
from numpy.typing import NDArray

from serve.answers.components import NOTHING, connect
from serve.answers.polygons import Regions, join_parts, trace_regions
from serve.contract.errors import ImageTooLargeError
from serve.contract.machine import usable_cpus
from serve.slides.outputs.format import SlideResult
from serve.slides.plan import Rectangle

T = TypeVar("T")
R = TypeVar("R")
_LEAST_SIDE = 64
_MOST_THREADS = 4
"""Blocks that are traced at the same time; one of nothing but noise takes a gigabyte."""
_CLASSES = range(1, NOTHING)
_COARSER, _LARGER = 2.0, 4
_MOST_TRIES = 6


@dataclass(frozen=True)
class Budget:
    """How far outlines are simplified, so that they have no more vertices than wanted."""

    simplify_cells: float
    min_cells: int


@dataclass(frozen=True)
class Outlines:
    """The regions of a slide."""

    budget: Budget
    parts: list[Regions]
    """Polygons in pixels of the slide's level 0; areas in cells, also where they are simplified."""


def outlines(result: SlideResult) -> Outlines:
    """The regions with the least simplification that keeps within the options' limit."""
    um2 = result.plan.um_per_cell**2
    options = result.options
    budget = Budget(options.simplify_cells, max(round(options.min_area_um2 / um2), 1))
    for _ in range(_MOST_TRIES):
        parts = _up_to(options.max_vertices, trace(result, budget))
        if parts is not None:
            return Outlines(budget, parts)
        simplify = max(budget.simplify_cells, 1) * _COARSER
        budget = Budget(simplify, budget.min_cells * _LARGER)
    return Outlines(budget, list(trace(result, budget)))


def _up_to(most_vertices: int, parts: Iterator[Regions]) -> list[Regions] | None:
    """The regions; None as soon as they have more vertices than wanted."""
    found, vertices = [], 0
    for part in parts:
        vertices += int(shapely.get_num_coordinates(part.polygons).sum())
        if vertices > most_vertices:
            return None
        found.append(part)
    return found


def trace(result: SlideResult, budget: Budget) -> Iterator[Regions]:
    """All regions of a slide's labels, in its frame; those of label 0 left out."""
    kept: list[Regions] = []
    shrunk: list[NDArray[np.object_]] = []

    def trace_block(rectangle: Rectangle) -> list[tuple[Rectangle, Regions]]:
        return list(_trace_parts(*result.cut(rectangle), rectangle, budget))

    for parts in _in_threads(trace_block, result.blocks()):
        for part, regions in parts:
            on_edge = _touches_edge(regions, part, result.plan.shape)
            inside = _large(regions.selected(~on_edge), budget)
            shrunk.append(_shrunk(inside, budget))
            yield _placed(result, inside)
            if on_edge.any():
                kept.append(regions.selected(on_edge))
    if kept:
        joined = _large(_join(kept), budget)
        shrunk.append(_shrunk(joined, budget))
        filled = _fill(joined.polygons, budget.min_cells, np.concatenate(shrunk))
        yield _placed(result, joined._replace(polygons=filled))


def _in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """What a function makes of items, in their order; few are in memory at the same time.

    numpy and shapely leave Python to other threads while they compute.
    """
    num_threads = min(usable_cpus(), _MOST_THREADS)
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="trace") as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _trace_parts(
    labels: NDArray[np.uint8],
    confidence: NDArray[np.uint8],
    cells: Rectangle,
    budget: Budget,
) -> Iterator[tuple[Rectangle, Regions]]:
    """Trace a rectangle; in quarters where it has more outlines than can be traced at once."""
    if not labels.any():
        return
    crop = _around(labels)
    try:
        found = join_parts(
            trace_regions(
                labels[crop],
                confidence[crop],
                simplify_px=budget.simplify_cells,
                min_area_px=budget.min_cells,
                shown=_CLASSES,
                is_part=True,
            )
        )
    except ImageTooLargeError:
        rows, columns = labels.shape
        if min(rows, columns) <= _LEAST_SIDE:
            raise
        middle_row, middle_column = rows // 2, columns // 2
        for top, bottom in ((0, middle_row), (middle_row, rows)):
            for left, right in ((0, middle_column), (middle_column, columns)):
                part = slice(top, bottom), slice(left, right)
                rectangle = Rectangle(
                    cells.top + top, cells.left + left, cells.top + bottom, cells.left + right
                )
                yield from _trace_parts(labels[part], confidence[part], rectangle, budget)
        return
    corner = np.array([cells.left + crop[1].start, cells.top + crop[0].start])
    moved = shapely.transform(found.polygons, lambda places: places + corner)
    yield cells, found._replace(polygons=moved)


def _around(labels: NDArray[np.uint8]) -> tuple[slice, slice]:
    """The rows and columns with labels, and one more on every side: all outlines are the same."""
    found = []
    for axis in (1, 0):
        places = np.flatnonzero(labels.any(axis=axis))
        found.append(slice(max(int(places[0]) - 1, 0), int(places[-1]) + 2))
    return found[0], found[1]


def _touches_edge(regions: Regions, part: Rectangle, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Which regions touch an edge of the part that another part lies behind."""
    bounds = shapely.bounds(regions.polygons).reshape(-1, 4)  # left, top, right, bottom
    rows, columns = shape
    touches = np.zeros(len(bounds), bool)
    for index, edge, inside in (
        (0, part.left, part.left > 0),
        (1, part.top, part.top > 0),
        (2, part.right, part.right < columns),
        (3, part.bottom, part.bottom < rows),
    ):
        if inside:
            touches |= bounds[:, index] == edge
    return touches


def _join(parts: list[Regions]) -> Regions:
    """Unite the regions of one label that share some length of an edge."""
    polygons, labels, area, mean_confidence = join_parts(parts)
    confidence = mean_confidence * area
    part = np.repeat(np.arange(len(parts)), [len(regions.polygons) for regions in parts])
    group = _components(polygons, labels, part)
    count = int(group.max(initial=-1)) + 1
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(count))
    united = np.empty(count, object)
    for index, members in enumerate(np.split(order, starts[1:])):
        united[index] = (
            polygons[members[0]] if len(members) == 1 else shapely.union_all(polygons[members])
        )
    total = np.bincount(group, area, count)
    return Regions(
        shapely.orient_polygons(united),  # a union may go round the other way
        labels[order[starts]],
        total.astype(np.int64),
        np.bincount(group, confidence, count) / total,
    )


def _components(
    polygons: NDArray[np.object_], labels: NDArray[np.uint8], part: NDArray[np.int64]
) -> NDArray[np.int64]:
    """A number per polygon, the same for those that are one region, in order of appearance."""
    one, other = shapely.STRtree(polygons).query(polygons)  # those whose bounds meet
    pairs = (part[one] < part[other]) & (labels[one] == labels[other])
    one, other = one[pairs], other[pairs]
    rims = shapely.boundary(polygons)
    shared = shapely.length(shapely.intersection(rims[one], rims[other])) > 0
    root = connect(len(polygons), one[shared], other[shared])
    return np.unique(root, return_inverse=True)[1].astype(np.int64)


def _large(regions: Regions, budget: Budget) -> Regions:
    return regions.selected(regions.area_px >= budget.min_cells)


def _shrunk(regions: Regions, budget: Budget) -> NDArray[np.object_]:
    """The polygons of large regions that look small where they are simplified."""
    found: NDArray[np.object_] = regions.polygons[shapely.area(regions.polygons) < budget.min_cells]
    return found


def _fill(
    polygons: NDArray[np.object_], min_cells: int, shrunk: NDArray[np.object_]
) -> NDArray[np.object_]:
    """Fill the holes of fewer cells: only small regions were in them, but for those that shrunk.

    Within a block they are filled before they are traced.
    """
    rings, of = shapely.get_rings(polygons, return_index=True)
    shapes = shapely.polygons(rings)
    is_hole = np.diff(of, prepend=-1) == 0
    is_filled = is_hole & (shapely.area(shapes) < min_cells)
    if len(shrunk):
        holes = np.flatnonzero(is_filled)
        places = shapely.point_on_surface(shrunk)
        is_filled[holes[shapely.STRtree(places).query(shapes[holes], "contains")[0]]] = False
    found = polygons.copy()
    changed = np.unique(of[is_filled])
    left = np.isin(of, changed) & ~is_filled
    found[changed] = shapely.polygons(rings[left], indices=np.searchsorted(changed, of[left]))
    return found


def _placed(result: SlideResult, found: Regions) -> Regions:
    """The regions in the slide's frame."""
    placed = shapely.transform(found.polygons, lambda places: np.round(result.to_level0(places), 2))
    return found._replace(polygons=placed)
