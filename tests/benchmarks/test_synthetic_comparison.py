import math
from pathlib import Path

from benchmarks.synthetic_comparison import (
    Options,
    Trial,
    TrialResult,
    affordable_epochs,
    best_dice,
    choose,
    complete_seeds,
    faster_device,
    trials,
)


def result(name: str, dice: float, seconds: float = 1.0, device: str = "cpu", own: bool = True):
    return TrialResult(Trial(name, (), takes_part=own), dice, seconds, device)


def test_the_best_validation_dice_of_our_own_models_is_chosen():
    results = [result("a", 0.7), result("b", 0.8), result("unet", 0.9, own=False)]
    assert choose([*results, result("failed", math.nan)]).name == "b"
    assert choose([result("failed", math.nan)]) == trials()[0]


def test_trainings_run_where_the_median_trial_took_less_time():
    results = [result("a", 0.7, 9.0, "cpu"), result("b", 0.7, 3.0, "cuda")]
    assert faster_device([*results, result("failed", math.nan, 0.1, "cpu")]) == "cuda"
    assert faster_device([]) == "cpu"


def test_fewer_epochs_are_trained_where_the_time_would_not_do():
    options = Options(out=Path(), processes=4, epochs=12, seeds=2, rows=("a", "b", "c", "d"))
    assert affordable_epochs(options, epoch_seconds=2, seconds_left=2 * 2 * 1.5 * 7) == 7
    assert affordable_epochs(options, epoch_seconds=2, seconds_left=3600) == 12
    assert affordable_epochs(options, epoch_seconds=2, seconds_left=1) == 3


def test_a_seed_is_complete_when_every_row_has_been_scored(tmp_path: Path):
    for row, seed in (("a", 0), ("b", 0), ("a", 1)):
        (tmp_path / row / f"seed{seed}").mkdir(parents=True)
        (tmp_path / row / f"seed{seed}" / "leverage.json").write_text("[]")
    assert complete_seeds(tmp_path, ("a", "b"), 5) == 1
    assert complete_seeds(tmp_path, ("a",), 2) == 2


def test_a_trial_without_scores_has_no_dice(tmp_path: Path):
    assert math.isnan(best_dice(tmp_path))
    (tmp_path / "metrics.csv").write_text("epoch,validation/dice/mean\n0,0.25\n1,0.5\n2,0.375\n")
    assert best_dice(tmp_path) == 0.5
