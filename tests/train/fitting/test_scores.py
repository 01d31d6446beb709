import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.errors import raises
from tests.support.toy_data import toy_settings, write_twice_as_large
from train.errors import (
    BaselineError,
    CheckpointError,
    ScaleError,
)
from train.fitting.run import fit
from train.fitting.scores import evaluate, print_scores
from train.model.checkpoint import load_checkpoint, read_card


def test_the_best_checkpoint_is_scored_as_during_training(toy_run: Path, toy_data: Path):
    segmenter, card = load_checkpoint(toy_run)
    scores = evaluate(segmenter, card, toy_data, "validation")
    assert scores == pytest.approx(card.metrics, abs=1e-6)


@pytest.mark.slow
def test_a_run_of_mixed_precision_is_scored_as_during_training(toy_data: Path, tmp_path: Path):
    settings = toy_settings(optimization={"epochs": 1, "precision": "bf16-mixed"})
    card = fit(settings, toy_data, tmp_path / "run")
    segmenter, _ = load_checkpoint(tmp_path / "run")
    scores = evaluate(segmenter, card, toy_data, "validation")
    assert scores == pytest.approx(card.metrics, abs=1e-6)


def test_a_checkpoint_is_not_scored_on_other_classes_nor_a_baseline_of_them(
    toy_run: Path, data_copy: Path, tmp_path: Path
):
    description = data_copy / "dataset.json"
    description.write_text(description.read_text().replace("Tumor", "Gland"))
    segmenter, card = load_checkpoint(toy_run)
    with raises(CheckpointError, "Tumor", "Gland"):
        evaluate(segmenter, card, data_copy, "test")
    hcfa = toy_settings(model={"bias": "hcfa"})
    with raises(CheckpointError, "baseline", "Tumor", "Gland"):
        fit(hcfa, data_copy, tmp_path / "new", difficulty_from=toy_run)


def test_images_of_another_scale_are_resampled_before_they_are_scored(
    toy_run: Path, toy_data: Path, data_copy: Path
):
    write_twice_as_large(data_copy)
    model = load_checkpoint(toy_run)
    expected = evaluate(*model, toy_data, "test")
    assert evaluate(*model, data_copy, "test") == pytest.approx(expected, abs=0.02)


def test_images_of_unknown_scale_are_refused_where_the_models_is_known(
    toy_run: Path, data_copy: Path
):
    description = data_copy / "dataset.json"
    description.write_text(description.read_text().replace('"mpp": 0.5', '"mpp": null'))
    with raises(ScaleError, "2 images", "tile10", "0.5 um per pixel"):
        evaluate(*load_checkpoint(toy_run), data_copy, "test")


def without_metrics(run: Path) -> None:
    card = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps({**card, "metrics": {}}))


@pytest.mark.parametrize(
    ("bias", "damage", "values"),
    [
        ("hcfa", shutil.rmtree, ("fit synthetic --bias none", "--data", "--out")),
        ("hcfa", without_metrics, ("fit synthetic --bias none",)),
        ("dfa", Path.exists, ("--difficulty-from", "--bias dfa")),
    ],
)
def test_a_baseline_that_is_of_no_use_is_refused(
    run_copy: Path,
    toy_data: Path,
    tmp_path: Path,
    bias: str,
    damage: Callable[[Path], object],
    values: tuple[str, ...],
):
    damage(run_copy)
    settings = toy_settings(model={"bias": bias})
    with raises(BaselineError, *values):
        fit(settings, toy_data, tmp_path / "new", difficulty_from=run_copy)


def test_scores_of_classes_and_folders_with_brackets_are_printed_as_they_are(
    toy_run: Path, capsys: pytest.CaptureFixture[str]
):
    card = read_card(toy_run)
    odd = replace(card.classes[0], name="[/b]")
    card = replace(card, classes=(odd, *card.classes[1:]))
    scores = {f"{score}/{name}": 0.5 for score in ("dice", "iou") for name in ("[/b]", "mean")}
    others = [entry.name for entry in card.classes[1:]]
    scores |= {f"{score}/{name}": 0.5 for score in ("dice", "iou") for name in others}
    print_scores(scores, card, "runs/[/x]")
    out = capsys.readouterr().out
    assert "[/b]" in out
    assert "runs/[/x]" in out
