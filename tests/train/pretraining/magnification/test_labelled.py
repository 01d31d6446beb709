"""Which squares become labelled tiles, and the labels of their cells, on a mask made by hand."""

from typing import Any

import numpy as np
import pytest

from train.pretraining.footprints import Footprint
from train.pretraining.magnification.labelled import LabelledSlides, LabelledTile, labelled_tiles
from train.pretraining.magnification.segmentation import _patch_labels, true_map
from train.pretraining.regions import SlideInfo
from train.pretraining.split_source import SplitSource
from train.settings import LabelClass

MPP = 0.5
CLASSES = tuple(LabelClass(name=name, color="#000000") for name in ("A", "B"))


def _slides(labels: np.ndarray) -> LabelledSlides:
    height, width = (side * MPP for side in labels.shape)
    source: Any = type("Source", (), {"slides": [SlideInfo("s", width, height, MPP, "case")]})()
    found = SplitSource(source, {"training": (), "validation": (), "test": (0,)}, "hand-made")
    return LabelledSlides(found, CLASSES, lambda slide: (labels, MPP))


def _square(*rows_of_label: tuple[int, int]) -> np.ndarray:
    """32 x 32 pixels: so many rows of each label."""
    return np.concatenate([np.full((rows, 32), label, np.uint8) for rows, label in rows_of_label])


def test_a_tile_needs_enough_labels_and_enough_of_one_class() -> None:
    labels = np.block(
        [
            [_square((32, 1)), _square((9, 1), (23, 2)), _square((16, 1), (16, 2))],
            [_square((16, 0), (16, 1)), _square((10, 0), (22, 2)), _square((32, 0))],
        ]
    )
    found = labelled_tiles(
        _slides(labels), "test", 16.0, purity=0.6, max_per_slide=10, finest_mpp=MPP
    )
    assert found == [
        LabelledTile(0, Footprint(0.0, 0.0, 16.0), 1),
        LabelledTile(0, Footprint(0.0, 16.0, 16.0), 2),
        LabelledTile(0, Footprint(16.0, 16.0, 16.0), 2),
    ]
    ends = labelled_tiles(
        _slides(labels), "test", 16.0, purity=0.6, max_per_slide=2, finest_mpp=MPP
    )
    assert ends == [found[0], found[2]]


@pytest.mark.parametrize("corner", [(8.0, 32.0), (0.0, 16.0)])
def test_cells_and_patches_take_the_class_of_most_of_their_pixels(
    corner: tuple[float, float],
) -> None:
    """A square of 16 um, cells of 8: the pixels of each are counted one by one."""
    labels = np.random.default_rng(0).integers(0, 3, (64, 128)).astype(np.uint8)
    labels[16:32] = np.where(labels[16:32] == 2, 1, labels[16:32])
    square = Footprint(*corner, 16.0)
    top, left = (int(at / MPP) for at in corner)
    cells = [
        np.bincount(
            labels[top + 16 * i : top + 16 * (i + 1), left + 16 * j : left + 16 * (j + 1)].ravel(),
            minlength=3,
        )
        for i in range(2)
        for j in range(2)
    ]
    found = true_map(_slides(labels), 0, square)
    assert found.ravel().tolist() == [int(counts.argmax()) for counts in cells]
    clear = [
        1 + int(counts[1:].argmax()) if counts[1:].max() >= 0.6 * counts.sum() else 0
        for counts in cells
    ]
    assert _patch_labels(_slides(labels), 0, square, 2).tolist() == clear
