import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import scale_robustness
from benchmarks.scale_robustness import Robustness, _text, resampled_dice, run_robustness
from tests.support.toy_data import toy_settings, write_toy_data
from train.settings import OptimizationSettings


def test_resamples_of_one_case_and_one_seed_are_the_score_itself():
    run = np.zeros((1, 2, 2, 2))
    run[0, 0] = [[3, 1], [0, 4]]
    run[0, 1] = [[1, 0], [2, 1]]
    drawn = resampled_dice([run], ["one case", "one case"])
    first, second = 2 * 4 / (5 + 6), 2 * 5 / (7 + 6)
    assert drawn == pytest.approx((first + second) / 2)


def test_resamples_differ_where_cases_do():
    run = np.zeros((1, 2, 2, 2))
    run[0, 0], run[0, 1] = [[9, 0], [0, 9]], [[0, 9], [9, 0]]
    drawn = resampled_dice([run], ["good", "bad"])
    assert drawn.min() == 0
    assert drawn.max() == 1


def test_intervals_are_expanded_for_few_seeds():
    drawn = np.linspace(-1, 1, 2001)
    assert _text(0.0, drawn, (5, 100)) == "0.000 [-0.998, 0.998]"  # and not 0.95


@pytest.mark.slow
def test_a_segmenter_is_scored_at_the_stated_scale_and_at_wrong_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    preset = toy_settings(optimization=OptimizationSettings(epochs=1, batch_size=4))
    monkeypatch.setitem(scale_robustness.PRESETS, "toy", lambda: preset)
    study = Robustness(
        preset="toy",
        data=write_toy_data(tmp_path / "data"),
        out=tmp_path / "out",
        trained=(),
        factors=(1.0, 2.0),
        seeds=(0,),
    )
    run_robustness(study)
    run_robustness(replace(study, seeds=(0, 1)))  # goes on
    with (study.out / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["factor"]) for row in rows] == [
        (seed, factor) for seed in ("0", "1") for factor in ("1.0", "2.0")
    ]
    assert rows[0] != {**rows[1], "factor": "1.0"}, "another stated scale, other answers"
    assert "random, frozen" in (study.out / "README.md").read_text()
