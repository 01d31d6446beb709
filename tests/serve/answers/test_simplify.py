import numpy as np
import pytest
import shapely
from numpy.typing import NDArray
from PIL import Image

from serve.answers.edges import Edges
from serve.answers.polygons import Regions, trace_regions
from serve.answers.simplify import simplify_edges

RANDOM = np.random.default_rng(0)


def _trace(labels: NDArray[np.uint8], simplify_px: float) -> Regions:
    return trace_regions(labels, np.full(labels.shape, 255, np.uint8), simplify_px=simplify_px)


def _blobs(height: int, width: int, num_labels: int, size: int) -> NDArray[np.uint8]:
    """Labels in blobs of about `size` pixels; noise where that is 1."""
    coarse = RANDOM.random((num_labels, height // size + 2, width // size + 2)).astype(np.float32)
    fields = [
        np.asarray(Image.fromarray(field).resize((width, height), Image.Resampling.BICUBIC))
        for field in coarse
    ]
    return (np.argmax(fields, axis=0) + 1).astype(np.uint8)


def _described(regions: Regions) -> list[tuple[int, int, int]]:
    """Label, area and number of holes of each region; their order is not fixed."""
    holes = shapely.get_num_interior_rings(regions.polygons).tolist()
    return sorted(zip(regions.labels.tolist(), regions.area_px.tolist(), holes, strict=True))


def _edges(labels: NDArray[np.uint8]) -> Edges:
    return Edges.of(labels, np.ones(labels.shape, bool))


@pytest.mark.parametrize("simplify_px", [0.8, 2, 5, 100])
def test_every_region_and_every_hole_is_kept_and_none_overlaps_another(
    simplify_px: float,
) -> None:
    for _ in range(40):
        height, width, num_labels, size = RANDOM.integers((1, 1, 1, 1), (40, 40, 5, 9)).tolist()
        labels = _blobs(height, width, num_labels, size)
        exact, simple = _trace(labels, 0), _trace(labels, simplify_px)
        assert shapely.is_valid(simple.polygons).all()
        assert shapely.coverage_is_valid(simple.polygons)
        assert shapely.area(simple.polygons).sum() == height * width
        assert _described(simple) == _described(exact)


def test_triangles_up_to_the_tolerance_are_cut_off_and_no_larger_ones() -> None:
    step = np.ones((12, 12), np.uint8)
    step[6:, :4] = 2
    step[9:, 4:8] = 2  # both corners of the step span triangles of 4 x 3 / 2 = 6 pixels
    below, above = (
        int(shapely.get_num_coordinates(_trace(step, area**0.5).polygons).sum())
        for area in (5.9, 6.1)
    )
    assert below - above >= 2


def test_a_stair_becomes_about_a_straight_line() -> None:
    stair = (np.arange(60)[:, None] >= np.arange(60)[None]).astype(np.uint8) + 1
    upper, lower = _trace(stair, 1).polygons
    assert shapely.get_num_coordinates(upper) < 30  # of 120
    line = shapely.LineString([(0, 0), (60, 60)])
    shared = upper.intersection(lower)
    assert shapely.hausdorff_distance(shared, line) <= 1.5


def test_glass_around_an_image_changes_no_vertex_of_its_regions() -> None:
    labels = _blobs(40, 50, 3, 4)
    labels[0] = labels[-1] = labels[:, 0] = labels[:, -1] = 1
    around = np.ones((90, 71), np.uint8)
    around[17:57, 9:59] = labels
    found, expected = (
        {
            polygon.wkb
            for polygon, label in zip(regions.polygons, regions.labels, strict=True)
            if label > 1
        }
        for regions in (_trace(around, 2), _trace(labels, 2))
    )
    moved = {
        shapely.transform(shapely.from_wkb(polygon), lambda xy: xy - [9, 17]).wkb
        for polygon in found
    }
    assert moved == expected
    assert len(moved) > 5


def test_each_edge_that_is_left_has_its_opposite() -> None:
    edges = simplify_edges(_edges(_blobs(40, 40, 4, 3)), 2)
    inner = edges.twin >= 0
    twin = edges.twin[inner]
    assert np.array_equal(edges.start[twin], edges.end[inner])
    assert np.array_equal(edges.end[twin], edges.start[inner])
    assert np.array_equal(np.sort(edges.end), np.sort(edges.start))


def test_an_image_of_one_region_is_its_frame() -> None:
    edges = simplify_edges(_edges(np.ones((5, 4), np.uint8)), 100)
    assert sorted(zip(edges.x[edges.start], edges.y[edges.start], strict=True)) == [
        (0, 0),
        (0, 5),
        (4, 0),
        (4, 5),
    ]
