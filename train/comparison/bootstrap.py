"""Scores over seeds, and paired bootstrap intervals of Dice over test tiles.

A resample draws as many tiles as there are, with replacement, and pools the pixels of what it drew.
It is the same for every row and seed, so differences between rows are paired. Models stay as they
are: the intervals cover which tiles were tested, and not another training.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from train.comparison.compare import Comparison
from train.comparison.methods import BASELINE, RowName
from train.metrics import class_scores

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate and the bounds of its 95 % bootstrap interval."""

    estimate: float
    low: float
    high: float


class Difference(NamedTuple):
    """Mean Dice of one row minus that of another."""

    interval: Interval
    per_seed: tuple[float, ...]

    @property
    def num_higher(self) -> int:
        """Seeds with a positive difference."""
        return sum(value > 0 for value in self.per_seed)

    @property
    def verdict(self) -> Literal["higher", "lower", "undecided"]:
        """Undecided unless the interval leaves out 0 and every seed agrees."""
        if self.interval.low > 0 and all(value > 0 for value in self.per_seed):
            return "higher"
        if self.interval.high < 0 and all(value < 0 for value in self.per_seed):
            return "lower"
        return "undecided"


def seed_scores(comparison: Comparison, name: RowName, metric: Literal["dice", "iou"]) -> Floats:
    """A row's scores of each seed, (S, 1 + C): the mean over classes, then each class."""
    scores = [
        getattr(class_scores(torch.from_numpy(result.confusion.sum(axis=0))), metric).double()
        for result in comparison.of(name)
    ]
    return np.stack([np.concatenate([[value.nanmean()], value]) for value in scores])


class Bootstrap:
    """The same resamples of the test tiles for every row."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        num_tiles = len(comparison.data.tiles["test"])
        share = np.full(num_tiles, 1 / num_tiles)
        rng = np.random.default_rng(0)
        # How often each tile was drawn, (resamples, N).
        self._draws = rng.multinomial(num_tiles, share, NUM_RESAMPLES).astype(np.float64)
        self._resampled: dict[RowName, Floats] = {}

    def dice(self, name: RowName) -> list[Interval]:
        """Dice of a row, averaged over seeds: the mean over classes, then each class."""
        estimates = seed_scores(self.comparison, name, "dice").mean(axis=0)
        return _intervals(estimates, self._resample(name))

    def differences(self, name: RowName, other: RowName = BASELINE.name) -> list[Difference]:
        """Dice of a row minus another's: the mean over classes, then each class."""
        first, second = (seed_scores(self.comparison, row, "dice") for row in (name, other))
        per_seed = first - second
        resampled = self._resample(name) - self._resample(other)
        intervals = _intervals(per_seed.mean(axis=0), resampled)
        return [
            Difference(interval, tuple(values))
            for interval, values in zip(intervals, per_seed.T.tolist(), strict=True)
        ]

    def _resample(self, name: RowName) -> Floats:
        """Dice of every resample, averaged over seeds, (resamples, 1 + C)."""
        if name not in self._resampled:
            seeds = [self._resample_dice(r.confusion) for r in self.comparison.of(name)]
            self._resampled[name] = np.mean(seeds, axis=0)
        return self._resampled[name]

    def _resample_dice(self, confusion: NDArray[np.int64]) -> Floats:
        """Dice of pooled pixels; a class neither drawn nor predicted is NaN, and in no mean."""
        matches = self._draws @ np.diagonal(confusion, axis1=1, axis2=2)  # resamples x C
        pixels = self._draws @ (confusion.sum(axis=1) + confusion.sum(axis=2))
        dice = np.divide(2 * matches, pixels, out=np.full_like(matches, np.nan), where=pixels > 0)
        present = ~np.isnan(dice)
        total = np.where(present, dice, 0).sum(axis=1)
        num_present = present.sum(axis=1)
        mean = np.divide(total, num_present, out=np.full_like(total, np.nan), where=num_present > 0)
        return np.column_stack([mean, dice])


def _intervals(estimates: Floats, resampled: Floats) -> list[Interval]:
    """Percentile intervals of each column; NaN where no resample has a value."""
    tail = (1 - CONFIDENCE) / 2
    intervals = []
    for estimate, column in zip(estimates.tolist(), resampled.T, strict=True):
        values = column[~np.isnan(column)]
        low, high = np.quantile(values, [tail, 1 - tail]) if len(values) else (np.nan, np.nan)
        intervals.append(Interval(estimate, float(low), float(high)))
    return intervals
