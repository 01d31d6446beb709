"""How training tiles are varied."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from tests.support.pictures import blobs
from train.data.augmentation import (
    NUM_VIEWS,
    _vary_light,
    _vary_stains,
    draw_window,
    turn,
    turn_back,
    vary_colors,
)
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


class _Drawn:
    """A source of chance that gives these numbers, one after the other."""

    def __init__(self, *values: Any) -> None:
        self._values = list(values)

    def uniform(self, low: float, high: float, size: int | None = None) -> Any:
        found = self._values.pop(0)
        assert np.shape(found) == (() if size is None else (size,))
        return found


def test_brightness_contrast_and_saturation_are_torchvisions():
    muted = torch.rand(3, 12, 10, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.35
    rng: Any = _Drawn(np.array([0.2, -0.3, 0.4]), 0.0)
    found = _vary_light(muted.reshape(3, -1) * 255, rng, 0.5).reshape(muted.shape) / 255
    expected = functional.adjust_brightness(muted, 1.2)
    expected = functional.adjust_contrast(expected, 0.7)
    expected = functional.adjust_saturation(expected, 1.4)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_hue_turns_the_chroma_in_yiq_and_keeps_the_light():
    yiq = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    pixels = np.random.default_rng(0).uniform(80, 170, (3, 50))
    rng: Any = _Drawn(np.array([0.0, 0.0, 0.25]), 0.1)
    found = yiq @ _vary_light(torch.from_numpy(pixels).float(), rng, 0.5).numpy()
    before = yiq @ pixels
    chroma, turned = before[1] + 1j * before[2], found[1] + 1j * found[2]
    np.testing.assert_allclose(found[0], before[0], atol=0.01)
    np.testing.assert_allclose(turned, 1.25 * chroma * np.exp(2j * math.pi * 0.1), atol=0.05)


def test_stains_are_scaled_and_shifted_in_optical_density():
    """Pixel by pixel: the amounts of three stains that explain it, each varied."""
    stains = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    pixels = np.random.default_rng(0).integers(60, 240, (3, 40)).astype(np.uint8)
    factors, shifts = np.array([0.05, -0.04, 0.03]), np.array([0.02, -0.01, 0.015])
    rng: Any = _Drawn(factors, shifts)
    found = _vary_stains(torch.from_numpy(pixels), rng, 0.05).numpy()
    for pixel, changed in zip(pixels.T.astype(float), found.T, strict=True):
        amounts = np.linalg.solve(stains.T, -np.log((pixel + 1) / 256))
        varied = amounts * (1 + factors) + shifts
        np.testing.assert_allclose(changed, 256 * np.exp(-stains.T @ varied) - 1, rtol=1e-4)


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
