"""Bootstrap intervals, above all with few seeds and cases."""

import numpy as np
import pytest
from scipy import stats

from train.intervals import bootstrap_interval, percentiles


@pytest.mark.parametrize("num_drawn", [(5, 40), (40, 5), (5, 5), (1, 5)])
def test_the_smallest_number_that_is_resampled_expands_the_percentiles(
    num_drawn: tuple[int, int],
) -> None:
    low, high = percentiles(num_drawn)
    # A normal sample of 5: the bootstrap's spread is s * sqrt(4 / 5) / sqrt(5), Student's interval
    # reaches t * s / sqrt(5).
    assert stats.norm.ppf(high) * np.sqrt(4 / 5) == pytest.approx(stats.t.ppf(0.975, 4))
    assert low == pytest.approx(1 - high)


@pytest.mark.parametrize("num_drawn", [(), (1,), (1, 1), (100_000, 200_000)])
def test_the_middle_95_percent_are_left_where_nothing_is_few(num_drawn: tuple[int, ...]) -> None:
    assert percentiles(num_drawn) == pytest.approx((0.025, 0.975), abs=1e-5)


def test_a_bound_is_nan_only_where_no_resample_has_a_value() -> None:
    assert np.isnan(bootstrap_interval(np.array([np.nan, np.nan]), (5,))).all()
    values = np.array([np.nan, *np.linspace(0, 1, 1001)])
    assert bootstrap_interval(values, ()) == pytest.approx((0.025, 0.975))


@pytest.mark.slow
@pytest.mark.parametrize(("num_seeds", "num_cases"), [(5, 40), (5, 3), (3, 9)])
def test_without_a_difference_few_intervals_leave_out_0(num_seeds: int, num_cases: int) -> None:
    rng = np.random.default_rng(0)
    wrong = {"expanded": 0, "plain": 0}
    repeats = 200
    for _ in range(repeats):
        of_seeds = rng.standard_normal((num_seeds, 1))
        of_cases = rng.standard_normal((1, num_cases))
        scores = of_seeds + of_cases + rng.standard_normal((num_seeds, num_cases))
        seeds, cases = (
            rng.multinomial(number, np.full(number, 1 / number), 500) / number
            for number in (num_seeds, num_cases)
        )
        resampled = ((seeds @ scores) * cases).sum(axis=1)
        for name, num_drawn in (("expanded", (num_seeds, num_cases)), ("plain", ())):
            low, high = bootstrap_interval(resampled, num_drawn)
            wrong[name] += not low <= 0 <= high
    assert wrong["expanded"] / repeats < 0.06
    assert wrong["plain"] / repeats > 0.09
