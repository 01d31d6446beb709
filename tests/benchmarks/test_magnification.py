import csv
import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import magnification
from benchmarks.magnification import Study, measure_row, pretrain_row, report
from benchmarks.magnification_pace import Pace, steps_that_fit
from benchmarks.magnification_trials import TRIALS, VARIATIONS, Trial
from tests.support.errors import raises
from tests.support.tiny_pretraining import tiniest_pretraining
from train.errors import SettingsError
from train.pretraining.magnification.evaluate import Evaluation
from train.pretraining.magnification.labelled import open_labelled
from train.pretraining.magnification.settings import EvaluationSettings
from train.pretraining.settings import PretrainSettings, synthetic


def _differing(first: PretrainSettings, second: PretrainSettings) -> set[str]:
    groups = [
        (asdict(first), asdict(second), name) for name in ("views", "distillation", "schedule")
    ]
    return {key for a, b, name in groups for key in a[name] if a[name][key] != b[name][key]}


@pytest.mark.parametrize("trial", VARIATIONS, ids=lambda trial: trial.name)
def test_a_variation_changes_one_setting_of_its_method(trial: Trial):
    base = synthetic()
    plain = TRIALS[trial.method].settings(base, 0)
    assert len(_differing(trial.settings(base, 0), plain)) == 1


def test_the_longest_trials_start_first(tmp_path: Path):
    rows = Study(out=tmp_path).rows()
    assert {name for name, _ in rows[:2]} == {"mad-2x-steps", "dino-mixed-2x-steps"}
    assert len(rows) == len(set(rows)) == 3 * 6 + 8


def test_a_learning_rate_holds_for_every_trial_that_names_none(tmp_path: Path):
    base = Study(out=tmp_path, learning_rate=2e-4).base()
    rates = {name: trial.settings(base, 0).schedule.learning_rate for name, trial in TRIALS.items()}
    named = {"mad-lr-3e-4": 3e-4, "mad-lr-3e-3": 3e-3}
    assert rates == dict.fromkeys(TRIALS, 2e-4) | named
    assert Study(out=tmp_path).base().schedule.learning_rate == synthetic().schedule.learning_rate


def test_steps_are_fitted_to_the_time_that_is_left(tmp_path: Path):
    study = Study(out=tmp_path, steps=100, steps_per_epoch=50)
    rows = [("mad", 0), ("dino-mixed", 0), ("mad", 1)]
    pace = Pace({"mad": 0.1, "dino-mixed": 0.04}, start_s=10.0)
    # DINO has twice the steps. Per 100 steps, one process takes 28 s, the longer of two 18 s.
    one, two = (steps_that_fit(rows, study.base(), pace, n, 1100.0) for n in (1, 2))
    assert one == pytest.approx((1100 - 30) / 1.1 / 0.28, abs=50)
    assert two == pytest.approx((1100 - 20) / 1.1 / 0.18, abs=50)
    assert one % 50 == two % 50 == 0


def test_a_study_whose_steps_cannot_be_timed_ends_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(magnification, "measure_pace", lambda *given: None)
    study = Study(out=tmp_path, processes=14, seconds=100.0)
    with raises(SettingsError, "14", "--processes"):
        magnification.fitted(study, tmp_path, time.monotonic())


@pytest.mark.slow
def test_a_study_reports_the_rows_that_there_are(
    labelled_slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(magnification.PRESETS, "synthetic", tiniest_pretraining)
    study = Study(
        out=tmp_path / "study",
        evaluation=EvaluationSettings(tile_px=32, purity=0.3, tiles_per_slide=8, same_field=False),
        steps=2,
        steps_per_epoch=1,
        batch_size=2,
        precision="32-true",
        num_workers=0,
        seeds=1,
    )
    evaluation = Evaluation(open_labelled(labelled_slides), study.evaluation)
    for row in (("mad", 0), ("mad-lr-3e-3", 0)):
        pretrain_row(row, study, labelled_slides)
        measure_row(row, study, evaluation)
    measure_row(("random", 0), study, evaluation)
    report(study, evaluation)
    with (study.out / "report" / "probes.csv").open(newline="") as file:
        assert {row["encoder"] for row in csv.DictReader(file)} == {"random", "mad"}
    with (study.out / "variations" / "probes.csv").open(newline="") as file:
        assert {row["encoder"] for row in csv.DictReader(file)} == {"random", "mad", "mad-lr-3e-3"}
    with (study.out / "pretraining.csv").open(newline="") as file:
        assert [(r["encoder"], r["steps"]) for r in csv.DictReader(file)] == [
            (name, steps) for name in ("mad", "mad-lr-3e-3") for steps in ("1", "2")
        ]
    record = json.loads((study.encoder_of(("mad-lr-3e-3", 0)).parent / "pretrain.json").read_text())
    assert record["schedule"]["learning_rate"] == 3e-3
