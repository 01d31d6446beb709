"""Stain jitter and blur, against numpy and scipy."""

import numpy as np
import torch
from scipy import ndimage

from train.pretraining.colors import change_colors, draw_colors
from train.pretraining.settings import ViewSettings


def _view(seed: int = 0) -> np.ndarray:
    smooth = ndimage.gaussian_filter(
        np.random.default_rng(seed).normal(size=(3, 40, 40)), (0, 2, 2)
    )
    return np.clip(150 + 200 * smooth, 60, 230).astype(np.uint8)


def _changed(view: np.ndarray, *colors: float) -> np.ndarray:
    return change_colors(torch.from_numpy(view)[None], torch.tensor([colors]))[0].numpy()


def _density(view: np.ndarray) -> np.ndarray:
    return -np.log((view.astype(float) + 1) / 256)


def test_gains_scale_each_channels_mean_density_and_contrast_what_is_around_it() -> None:
    before = _density(_view())
    after = _density(_changed(_view(), 0.8, 1.2, 1.4, 0.7, 0, 0))
    mean = before.mean(axis=(1, 2), keepdims=True)
    expected = mean * np.array([0.8, 1.2, 1.4])[:, None, None] + 0.7 * (before - mean)
    np.testing.assert_allclose(after, expected, atol=1e-4)


def test_a_grey_view_has_one_value_in_all_channels() -> None:
    red, green, blue = _changed(_view(), 1, 1, 1, 1, 1, 0)
    assert np.array_equal(red, green)
    assert np.array_equal(green, blue)
    assert red.std() > 1


def test_the_blur_is_a_gaussian_of_sigma_pixels() -> None:
    found = _changed(_view(1), 1, 1, 1, 1, 0, 1.7)
    expected = [
        ndimage.gaussian_filter(channel, 1.7, mode="mirror", truncate=6 / 1.7)  # a radius of 6
        for channel in _view(1).astype(float)
    ]
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_each_view_of_a_batch_has_its_own_colours() -> None:
    views = np.stack([_view(seed) for seed in range(4)])
    colors = [
        [0.8, 1.2, 1.4, 0.7, 0, 1.7],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0, 2],
        [1] * 4 + [0, 0],
    ]
    together = change_colors(torch.from_numpy(views), torch.tensor(colors)).numpy()
    alone = [_changed(view, *each) for view, each in zip(views, colors, strict=True)]
    np.testing.assert_allclose(together, alone, atol=0.1)


def test_what_is_drawn_stays_in_its_ranges_and_blurs_in_um() -> None:
    rng, settings = np.random.default_rng(0), ViewSettings(stain_jitter=1.0)
    drawn = np.array([draw_colors(rng, 0.5, settings) for _ in range(2000)])
    for column, low, high in ((0, 0.4, 1.6), (1, 0.4, 1.6), (2, 0.4, 1.6), (3, 0.6, 1.4)):
        assert low <= drawn[:, column].min() < low + 0.02
        assert high - 0.02 < drawn[:, column].max() <= high
    assert abs(drawn[:, 4].mean() - 0.3) < 0.04
    sigma_um = drawn[drawn[:, 5] > 0, 5] * 0.5
    assert abs(len(sigma_um) / 2000 - 0.3) < 0.04
    assert 0.1 <= sigma_um.min() < sigma_um.max() <= 0.5
