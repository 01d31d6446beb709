"""The report's section on hard classes: does a method of ours do what it was made for?

The claim is ours, and it is stated before the runs: hard classes, those whose Dice of the
baseline is below its mean over the classes, gain at least `GAIN_MIN` with an interval above 0, and
no other class loses more than `LOSS_MAX`.
"""

from typing import NamedTuple

import numpy as np

from serve.contract.markdown import markdown_table
from train.comparison.bootstrap import NUM_SEEDS_MIN, Bootstrap, Difference, seed_scores
from train.comparison.methods import BASELINE, Row
from train.comparison.tables import class_lines, interval_text

GAIN_MIN = 0.01
"""Smallest gain of a hard class in Dice (our choice)."""
LOSS_MAX = 0.005
"""Largest loss of another class in Dice (our choice)."""


class Claim(NamedTuple):
    """What a row does to hard and to other classes."""

    hard: dict[str, Difference]
    others: dict[str, Difference]

    @property
    def holds(self) -> bool:
        """Whether every hard class gains enough, and no other one loses too much."""
        gains = [
            len(d.per_seed) >= NUM_SEEDS_MIN
            and d.interval.estimate >= GAIN_MIN
            and d.interval.low > 0
            for d in self.hard.values()
        ]
        losses = [d.interval.estimate < -LOSS_MAX for d in self.others.values()]
        return bool(gains) and all(gains) and not any(losses)


def judge_claim(bootstrap: Bootstrap, row: Row) -> Claim:
    """Compare a row with the baseline, class by class."""
    comparison = bootstrap.comparison
    baseline = seed_scores(comparison, BASELINE.name, "dice").mean(axis=0)
    differences = bootstrap.differences(row.name)
    hard: dict[str, Difference] = {}
    others: dict[str, Difference] = {}
    for name, dice, difference in zip(
        class_lines(comparison)[1:], baseline[1:], differences[1:], strict=True
    ):
        if not np.isnan(dice):
            (hard if dice < baseline[0] else others)[name] = difference
    return Claim(hard, others)


def claim_section(bootstrap: Bootstrap) -> str:
    """The claim's outcome for every row of ours that has a bias; empty where there is none."""
    rows = [row for row in bootstrap.comparison.rows if row.is_ours]
    if not rows:
        return ""
    lines = []
    for row in rows:
        claim = judge_claim(bootstrap, row)
        lines.append(
            [row.title, _cells(claim.hard), _cells(claim.others), "yes" if claim.holds else "no"]
        )
    header = ["Method", "Hard classes", "Other classes", "Claim holds"]
    return (
        "## Beyond the paper: hard classes\n\n"
        f"Hard classes are those whose Dice of {BASELINE.title} is below its mean over the "
        f"classes. The claim, made before the runs: each of them gains at least {GAIN_MIN:g} Dice "
        f"with an interval above 0 over at least {NUM_SEEDS_MIN} seeds, and no other class loses "
        f"more than {LOSS_MAX:g}. Differences are paired by case and seed.\n\n"
        + markdown_table(header, lines, align="lr")
    )


def _cells(differences: dict[str, Difference]) -> str:
    return "; ".join(
        f"{name} {interval_text(d.interval, sign=True)}" for name, d in differences.items()
    )
