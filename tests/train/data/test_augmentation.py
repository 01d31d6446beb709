"""How training tiles are varied."""

import numpy as np
import pytest
import torch

from tests.support.pictures import blobs
from train.data.augmentation import NUM_VIEWS, draw_window, turn, turn_back, vary_colors
from train.settings import AugmentationSettings

IMAGE = torch.from_numpy(blobs(32, 48).transpose(2, 0, 1).copy())


@pytest.mark.parametrize("view", range(NUM_VIEWS))
def test_every_view_can_be_undone(view: int):
    assert torch.equal(turn_back(turn(IMAGE, view), view), IMAGE)


@pytest.mark.parametrize(("color", "stain"), [(1e-9, 0.0), (0.0, 1e-9)])
def test_no_strength_leaves_the_colours_alone(color: float, stain: float):
    settings = AugmentationSettings(color_jitter=color, stain_jitter=stain)
    varied = vary_colors(IMAGE, np.random.default_rng(0), settings)
    assert (varied.int() - IMAGE.int()).abs().max() <= 1


@pytest.mark.parametrize(("color", "stain"), [(0.1, 0.0), (0.0, 0.05), (0.1, 0.05)])
def test_colours_vary_by_tens_and_not_by_more(color: float, stain: float):
    settings = AugmentationSettings(color_jitter=color, stain_jitter=stain)
    changes = [
        (vary_colors(IMAGE, np.random.default_rng(seed), settings).float() - IMAGE.float())
        .abs()
        .mean()
        for seed in range(20)
    ]
    assert 2 < np.mean(changes) < 40


def test_gray_stays_gray_when_hue_and_saturation_vary():
    gray = torch.full((3, 8, 8), 120, dtype=torch.uint8)
    settings = AugmentationSettings(color_jitter=0.5)
    for seed in range(5):
        varied = vary_colors(gray, np.random.default_rng(seed), settings)
        assert (varied[0].int() - varied[1:].int()).abs().max() <= 1


def test_white_glass_stays_bright_when_stains_vary():
    white = torch.full((3, 8, 8), 255, dtype=torch.uint8)
    settings = AugmentationSettings(color_jitter=0, stain_jitter=0.05)
    for seed in range(10):
        assert vary_colors(white, np.random.default_rng(seed), settings).min() > 215


def test_a_window_without_a_label_is_drawn_again():
    labels = np.zeros((64, 64), np.uint8)
    labels[:32] = 1
    rng = np.random.default_rng(0)
    windows = [draw_window(rng, labels, (16, 16), 1.0) for _ in range(40)]
    assert all(labels[window].any() for window in windows)


def test_crops_keep_their_share_of_the_area_and_stay_inside():
    labels = np.ones((70, 90), np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(100):
        rows, columns = draw_window(rng, labels, (64, 64), 0.25)
        height, width = rows.stop - rows.start, columns.stop - columns.start
        assert 0 <= rows.start < rows.stop <= 70
        assert 0 <= columns.start < columns.stop <= 90
        assert 0.2 < height * width / 64**2 <= 1.0
