"""Scores over seeds, and bootstrap intervals of Dice over seeds and test cases together.

A case is a patient or slide, as folds.csv groups the images, or an image where it does not. A
resample draws as many seeds and as many test cases as there are, both with replacement, pools the
pixels of the cases that it drew, and averages Dice over the seeds that it drew (our choice). The
percentiles are expanded for the smaller of both numbers (`train.intervals`); of a class, the cases
that have it count. A resample is the same for every row, so differences between rows are paired by
seed and case. A claim about a method rests on its seeds: intervals over cases alone would say only
that these very models differ.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from train.comparison.compare import Comparison
from train.comparison.methods import BASELINE, RowName
from train.intervals import bootstrap_interval, draw_counts
from train.metrics import class_scores

NUM_RESAMPLES = 10_000
NUM_SEEDS_MIN = 5
"""With fewer seeds no difference is told."""

Floats = NDArray[np.float64]
Verdict = Literal["higher", "lower", "equal", "undecided"]


class Interval(NamedTuple):
    """An estimate and the bounds of its 95 % bootstrap interval."""

    estimate: float
    low: float
    high: float


class Difference(NamedTuple):
    """Dice of one row minus that of another."""

    interval: Interval
    per_seed: tuple[float, ...]
    smallest: float
    """The smallest difference worth telling."""

    @property
    def verdict(self) -> Verdict:
        """What may be said.

        higher, lower: the interval leaves out 0, and the estimate is at least the smallest
        difference; equal: the whole interval is within the smallest difference of 0. Undecided in
        all other cases, and with fewer than `NUM_SEEDS_MIN` seeds.
        """
        estimate, low, high = self.interval
        if len(self.per_seed) < NUM_SEEDS_MIN:
            return "undecided"
        if low > 0 and estimate >= self.smallest:
            return "higher"
        if high < 0 and estimate <= -self.smallest:
            return "lower"
        return "equal" if -self.smallest < low <= high < self.smallest else "undecided"


def seed_scores(comparison: Comparison, name: RowName, metric: Literal["dice", "iou"]) -> Floats:
    """A row's scores of each seed, (S, 1 + C): the mean over classes, then each class.

    A class without a test pixel is NaN, and in no mean.
    """
    scores = [
        getattr(class_scores(torch.from_numpy(result.confusion.sum(axis=0))), metric).double()
        for result in comparison.of(name)
    ]
    return np.stack([np.concatenate([[value.nanmean()], value]) for value in scores])


class Bootstrap:
    """The same resamples of seeds and test cases for every row."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        rng = np.random.default_rng(0)
        names = [tile.group or tile.tile_id for tile in comparison.data.tiles["test"]]
        _, self._case_of_image = np.unique(names, return_inverse=True)
        self.num_cases = int(self._case_of_image.max()) + 1
        labels = next(iter(comparison.results.values())).confusion.sum(axis=2)  # images x C
        has_class = np.zeros((self.num_cases, labels.shape[1]), bool)
        np.logical_or.at(has_class, self._case_of_image, labels > 0)
        self._cases_of_column = [self.num_cases, *has_class.sum(axis=0).tolist()]
        # How often each case and each seed was drawn, (resamples, cases) and (resamples, S).
        self._cases = draw_counts(rng, self.num_cases, NUM_RESAMPLES)
        self._seeds = draw_counts(rng, len(comparison.seeds), NUM_RESAMPLES)
        self._resampled: dict[RowName, Floats] = {}

    def dice(self, name: RowName) -> list[Interval]:
        """Dice of a row, averaged over seeds: the mean over classes, then each class."""
        estimates = seed_scores(self.comparison, name, "dice").mean(axis=0)
        return self._intervals(estimates, self._resample(name))

    def differences(self, name: RowName, other: RowName = BASELINE.name) -> list[Difference]:
        """Dice of a row minus another's: the mean over classes, then each class."""
        first, second = (seed_scores(self.comparison, row, "dice") for row in (name, other))
        per_seed = first - second
        resampled = self._resample(name) - self._resample(other)
        intervals = self._intervals(per_seed.mean(axis=0), resampled)
        return [
            Difference(interval, tuple(values), self.comparison.smallest_difference)
            for interval, values in zip(intervals, per_seed.T.tolist(), strict=True)
        ]

    @property
    def num_drawn(self) -> tuple[int, int]:
        """How many seeds and how many cases a resample draws."""
        return len(self.comparison.seeds), self.num_cases

    def _intervals(self, estimates: Floats, resampled: Floats) -> list[Interval]:
        """The interval of the mean over classes, and of each class with the cases that have it."""
        num_seeds, _ = self.num_drawn
        return [
            Interval(estimate, *bootstrap_interval(column, (num_seeds, num_cases)))
            for estimate, column, num_cases in zip(
                estimates.tolist(), resampled.T, self._cases_of_column, strict=True
            )
        ]

    def _resample(self, name: RowName) -> Floats:
        """Dice of every resample, averaged over the seeds that it drew, (resamples, 1 + C)."""
        if name not in self._resampled:
            seeds = [
                resample_dice(result.confusion, self._case_of_image, self._cases)
                for result in self.comparison.of(name)
            ]
            shares = self._seeds / self._seeds.shape[1]
            self._resampled[name] = np.einsum("rs,src->rc", shares, np.stack(seeds))
        return self._resampled[name]


def resample_dice(
    confusion: NDArray[np.int64], case_of_image: NDArray[np.int64], drawn: Floats
) -> Floats:
    """Dice of every resample's pooled pixels; a class that was not drawn is NaN, and in no mean.

    Args:
        confusion: (N, C, C) pixels of each image, target x prediction.
        case_of_image: (N,), the case of each.
        drawn: (resamples, cases), how often each case was drawn.

    Returns:
        (resamples, 1 + C): the mean over classes, then each class.
    """
    cases = np.zeros((drawn.shape[1], *confusion.shape[1:]), np.int64)
    np.add.at(cases, case_of_image, confusion)
    matches = drawn @ np.diagonal(cases, axis1=1, axis2=2)  # resamples x C
    target = drawn @ cases.sum(axis=2)
    sizes = target + drawn @ cases.sum(axis=1)
    present = target > 0
    dice = np.divide(2 * matches, sizes, out=np.full_like(matches, np.nan), where=present)
    total = np.where(present, dice, 0).sum(axis=1)
    count = present.sum(axis=1)
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return np.column_stack([mean, dice])
