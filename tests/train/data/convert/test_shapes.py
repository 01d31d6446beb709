"""Outlines and holes become labels of pixels."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import shapely

from serve.images.mpp import PixelSize
from train.data.convert.class_mapping import ROI, ClassMapping
from train.data.convert.drawing import Drawing, Lost, drawing_of
from train.data.convert.shapes import Annotation, fill_shape
from train.settings import LabelClass

OUTLINE = (2, 2, 12, 12)


def box(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]], float)


@pytest.mark.parametrize(
    "holes",
    [
        [(4, 4, 8, 8)],
        [(4, 4, 8, 8), (6, 6, 10, 10)],  # they overlap
        [(8, 4, 15, 8)],  # beyond the outline
        [(-5, -5, 4, 20), (13, 13, 15, 15)],  # around an edge, and outside
        [(0, 0, 16, 16)],
    ],
)
def test_a_hole_takes_away_and_never_adds(holes: list[tuple[int, int, int, int]]):
    labels = np.zeros((16, 16), np.uint8)
    reached = fill_shape(labels, tuple(box(*edges) for edges in (OUTLINE, *holes)), 3)
    expected = np.zeros((16, 16), np.uint8)
    expected[2:12, 2:12] = 3
    for left, top, right, bottom in holes:
        expected[max(top, 0) : bottom, max(left, 0) : right] = 0
    np.testing.assert_array_equal(labels, expected)
    assert reached == bool(expected.any())


@pytest.mark.parametrize("seed", range(4))
def test_the_pixels_are_those_whose_centre_is_inside(seed: int):
    rng = np.random.default_rng(seed)
    ring = rng.uniform(-3, 23, (3, 2))
    labels = np.zeros((16, 20), np.uint8)
    fill_shape(labels, (ring,), 2)
    rows, columns = np.mgrid[:16, :20] + 0.5
    expected = shapely.contains_xy(shapely.Polygon(ring), columns, rows)
    np.testing.assert_array_equal(labels == 2, expected)


def test_an_outline_may_cross_itself_and_may_repeat_its_first_point():
    labels = np.zeros((8, 8), np.uint8)
    bow_tie = np.array([[0, 0], [8, 8], [8, 0], [0, 8], [0, 0]], float)
    fill_shape(labels, (bow_tie,), 1)
    rows, columns = np.mgrid[:8, :8]
    sides = (columns < rows) != (columns + rows > 7)
    centre = (columns == rows) | (columns + rows == 7)
    np.testing.assert_array_equal(labels[~centre], sides[~centre].astype(np.uint8))


@pytest.mark.parametrize("has_rois", [True, False])
@pytest.mark.parametrize("size", [(50, 70), (6, 70), (70, 6)])
def test_a_slide_that_is_drawn_in_parts_is_as_one_that_is_drawn_at_once(
    size: tuple[int, int], has_rois: bool
):
    rng = np.random.default_rng(0)

    def triangle(side: int) -> np.ndarray:
        return rng.uniform(0, size[::-1]) + rng.uniform(-side, side, (3, 2))

    shapes = [(str(n), n % 3, (triangle(9),)) for n in range(40)]
    rois = [(triangle(60),) for _ in range(2)] if has_rois else []
    drawing = Drawing(rois, shapes, size, uncovered=2)
    ((_, _, at_once),) = drawing.draw(100, Lost())
    part = np.zeros(size, np.uint8)
    for y, x, labels in drawing.draw(4, Lost()):
        part[y : y + labels.shape[0], x : x + labels.shape[1]] = labels
    np.testing.assert_array_equal(part, at_once)
    assert len(np.unique(part)) == 3


def test_areas_are_brought_to_the_tiles_scale_along_each_axis():
    mapping = ClassMapping(
        classes=(LabelClass(name="A", color="#ff0000"),), labels={"a": "A", "r": ROI}
    )
    reader: Any = SimpleNamespace(
        require_pixel_size=lambda: PixelSize(0.5, 0.25), height_px=80, width_px=60
    )
    found = [
        Annotation(label=label, rings=(box(2, 4, 10, 20),), kind="Polygon", place="1")
        for label in "ar"
    ]
    drawing = drawing_of(found, "file", reader, mapping, 0.25, smaller_on_top=False)
    assert drawing.size == (80, 120)
    ((_, _, (area,)),) = drawing.shapes
    ((roi,),) = drawing.rois
    np.testing.assert_array_equal(area, box(4, 4, 20, 20))
    np.testing.assert_array_equal(roi, area)
