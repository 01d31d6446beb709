"""Intervals of a study: cases are paired between encoders, seeds are not."""

import numpy as np

from train.pretraining.magnification.report import _resampled


def test_encoders_draw_their_seeds_independently_and_share_the_cases() -> None:
    rng = np.random.default_rng(0)
    cases = rng.normal(size=500)  # what the cases of a resample do to every seed
    seeds = np.array([0.0, 10.0, 20.0])
    of_seeds = [cases + seed for seed in seeds]
    first, again, other = (_resampled(name, of_seeds) for name in ("mad", "mad", "dino"))
    assert np.array_equal(first, again)
    assert len(np.unique((first - other).round(6))) > 3
    drawn = np.stack([first - cases, other - cases])  # means of three seeds, with replacement
    assert np.allclose(drawn * 3 / 10, (drawn * 3 / 10).round())
    assert np.allclose(drawn.mean(axis=1), 10, atol=1)
    assert np.allclose(drawn.std(axis=1), seeds.std() / np.sqrt(3), rtol=0.1)
    assert abs(np.corrcoef(drawn)[0, 1]) < 0.15
