from typing import Any

import numpy as np
import pytest
import shapely
from numpy.typing import NDArray

from serve.answers import components, edges
from serve.answers.polygons import Regions, join_parts, trace_regions
from serve.contract.errors import ImageTooLargeError
from tests.support.errors import raises

RANDOM = np.random.default_rng(0)


def _trace(labels: list[list[int]] | NDArray[np.uint8], **options: Any) -> Regions:
    array = np.asarray(labels, np.uint8)
    confidence = options.pop("confidence", np.full(array.shape, 255, np.uint8))
    return join_parts(trace_regions(array, confidence, **options))


def _painted(regions: Regions, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Each pixel gets the label of the one polygon that its centre is in."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    painted = np.zeros(shape, np.uint8)
    for polygon, label in zip(regions.polygons, regions.labels, strict=True):
        inside = shapely.contains_xy(polygon, x, y)
        assert not painted[inside].any(), "two polygons overlap"
        painted[inside] = label
    return painted


def _smooth_labels(size: int) -> NDArray[np.uint8]:
    y, x = np.mgrid[:size, :size]
    fields = [np.sin(x / (9 + k) + k) * np.cos(y / (11 - k) - k) for k in range(4)]
    return (np.argmax(fields, axis=0) + 1).astype(np.uint8)


@pytest.mark.parametrize("num_labels", [1, 2, 4])
def test_polygons_paint_the_labels_back_are_valid_and_share_their_edges(num_labels: int) -> None:
    for _ in range(60):
        shape = tuple(RANDOM.integers(1, 12, 2))
        labels = RANDOM.integers(1, num_labels + 1, shape).astype(np.uint8)
        regions = _trace(labels)
        assert np.array_equal(_painted(regions, shape), labels)
        assert shapely.is_valid(regions.polygons).all()
        assert shapely.coverage_is_valid(regions.polygons)


NESTED = np.pad(np.pad(np.pad(np.full((3, 3), 2), 1, constant_values=1), 1, constant_values=2), 1)


@pytest.mark.parametrize(
    ("labels", "areas", "num_holes"),
    [
        ([[4]], [1], 0),
        ([[1, 1, 2]], [1, 2], 0),
        ([[1, 1, 1], [1, 2, 1], [1, 1, 1]], [1, 8], 1),
        (NESTED, [9, 16, 24, 32], 3),  # a region in a hole of a region in a hole
        ([[1, 2], [2, 1]], [1, 1, 1, 1], 0),  # they touch in a corner
        ([[1, 1, 1], [1, 2, 1], [1, 1, 2]], [1, 1, 7], 1),  # one touches itself in a corner
    ],
)
def test_a_region_is_what_is_connected_through_sides_of_pixels(
    labels: Any, areas: list[int], num_holes: int
) -> None:
    polygons = _trace(labels).polygons
    assert sorted(shapely.area(polygons)) == areas
    assert shapely.get_num_interior_rings(polygons).sum() == num_holes


def test_area_and_confidence_are_those_of_the_regions_pixels() -> None:
    labels = RANDOM.integers(1, 3, (300, 20)).astype(np.uint8)  # more rows than one strip
    confidence = RANDOM.integers(0, 256, labels.shape).astype(np.uint8)
    y, x = np.mgrid[:300, :20] + 0.5
    regions = _trace(labels, confidence=confidence)
    for index, polygon in enumerate(regions.polygons):
        inside = shapely.contains_xy(polygon, x, y)
        assert regions.area_px[index] == inside.sum()
        expected = confidence[inside].mean() / 255
        assert regions.mean_confidence[index] == pytest.approx(expected)


def test_the_images_frame_stays_however_much_is_simplified() -> None:
    regions = _trace([[1, 1, 2], [1, 1, 2]], simplify_px=50)
    assert shapely.union_all(regions.polygons).equals(shapely.box(0, 0, 3, 2))


def test_simplified_polygons_are_fewer_points_and_still_a_coverage_of_the_image() -> None:
    labels = _smooth_labels(120)
    exact, simple = _trace(labels), _trace(labels, simplify_px=3)
    assert 3 * shapely.get_num_coordinates(simple.polygons).sum() < (
        shapely.get_num_coordinates(exact.polygons).sum()
    )
    assert shapely.is_valid(simple.polygons).all()
    assert shapely.coverage_is_valid(simple.polygons)
    assert shapely.union_all(simple.polygons).equals(shapely.box(0, 0, 120, 120))
    assert (_painted(simple, labels.shape) == labels).mean() > 0.9
    assert np.array_equal(exact.area_px, simple.area_px)


def _speckled(size: int) -> NDArray[np.uint8]:
    """Large regions full of specks, some of them in chains, at rims, in holes and in corners."""
    labels = _smooth_labels(size)
    specks = RANDOM.random((size, size)) < 0.2
    labels[specks] = RANDOM.integers(1, 5, specks.sum())
    return labels


@pytest.mark.parametrize("min_area_px", [2, 5, 40])
def test_leaving_out_small_regions_first_changes_nothing_of_those_that_stay(
    min_area_px: int,
) -> None:
    labels = _speckled(90)
    confidence = RANDOM.integers(0, 256, labels.shape, np.uint8)
    everything = _trace(labels, confidence=confidence)
    large = np.flatnonzero(everything.area_px >= min_area_px)
    regions = _trace(labels, confidence=confidence, min_area_px=min_area_px)
    assert len(large) == len(regions.polygons)
    for index, polygon in zip(large, regions.polygons, strict=True):
        exact = everything.polygons[index]
        holes = [hole for hole in exact.interiors if shapely.Polygon(hole).area >= min_area_px]
        assert polygon.is_valid
        assert polygon.equals(shapely.Polygon(exact.exterior, holes))
    for name in ("labels", "area_px", "mean_confidence"):
        assert np.array_equal(getattr(everything, name)[large], getattr(regions, name))


def test_labels_that_are_not_shown_are_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = RANDOM.integers(1, 3, (20, 20)).astype(np.uint8)
    labels[5:15, 5:15] = 3
    everything = _trace(labels)
    (expected,) = everything.polygons[everything.labels == 3]
    monkeypatch.setattr(edges, "MAX_EDGES", 100)
    regions = _trace(labels, shown=[3])
    assert regions.labels.tolist() == [3]
    assert regions.polygons[0].equals(expected)


@pytest.mark.parametrize("simplify_px", [0, 2, 5])
def test_outer_rings_run_counterclockwise_by_their_numbers_and_holes_clockwise(
    simplify_px: float,
) -> None:
    regions = _trace(_speckled(90), simplify_px=simplify_px, min_area_px=3)
    assert all(polygon.exterior.is_ccw for polygon in regions.polygons)
    holes = [hole for polygon in regions.polygons for hole in polygon.interiors]
    assert holes
    assert not any(hole.is_ccw for hole in holes)


def test_labels_that_change_too_often_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "MAX_RUNS", 100)
    with raises(ImageTooLargeError, 400, 100):
        _trace(np.indices((20, 20)).sum(0).astype(np.uint8) % 2)


def test_small_regions_are_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edges, "MAX_EDGES", 100)
    labels = np.ones((30, 30), np.uint8)
    labels[1:-1:2, 1:-1:2] = 2
    with raises(ImageTooLargeError, "min_area_px", 100, code="too_many_corners"):
        _trace(labels)
    (whole,) = _trace(labels, min_area_px=2).polygons
    assert whole.equals(shapely.box(0, 0, 30, 30))
