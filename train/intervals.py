"""Bootstrap intervals that hold with few seeds or cases.

A percentile interval of a bootstrap is too narrow for few units: it neglects that the spread is
estimated from them, and a resample of n units spreads by sqrt((n - 1) / n) of what it should. So
its percentiles are expanded to those that make a normal sample's interval as wide as Student's
(T. C. Hesterberg, What Teachers Should Know About the Bootstrap, arXiv 1411.5279).

No bootstrap reaches beyond its units. Where n of one kind make nearly all of the spread, at most
1 - 2^(1 - n) of the intervals hold the true value: 50% for 2 units, 75% for 3, 94% for 5.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95


def draw_counts(
    rng: np.random.Generator, num_units: int, num_resamples: int
) -> NDArray[np.float64]:
    """How often each resample draws each unit, with replacement: (resamples, units)."""
    share = np.full(num_units, 1 / num_units)
    return rng.multinomial(num_units, share, num_resamples).astype(np.float64)


def percentiles(num_drawn: Sequence[int]) -> tuple[float, float]:
    """The expanded percentiles, as shares of the resamples; the middle 95% for many units.

    Args:
        num_drawn: how many units of each kind a resample draws, such as seeds and cases. The
            smallest number counts; 1 does not, since such a kind is not resampled.
    """
    tail = (1 - CONFIDENCE) / 2
    least = min((number for number in num_drawn if number > 1), default=None)
    if least is not None:
        reach = np.sqrt(least / (least - 1)) * stats.t.ppf(1 - tail, least - 1)
        tail = float(stats.norm.cdf(-reach))
    return tail, 1 - tail


def bootstrap_interval(
    resampled: NDArray[np.float64], num_drawn: Sequence[int]
) -> tuple[float, float]:
    """Bounds of the 95% interval.

    Args:
        resampled: one value per resample, (resamples,); NaN where it has none.
        num_drawn: see `percentiles`.

    Returns:
        Lower and upper bound; NaN where no resample has a value.
    """
    values = resampled[np.isfinite(resampled)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, percentiles(num_drawn))
    return float(low), float(high)
