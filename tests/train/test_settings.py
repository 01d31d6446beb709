import sys

import pytest

from benchmarks.training import BenchmarkSettings
from train.cli import main
from train.errors import FocalPathError
from train.settings import (
    PRESETS,
    AugmentationSettings,
    BiasSettings,
    LossSettings,
    ModelSettings,
    OptimizationSettings,
    RuntimeSettings,
)


@pytest.mark.parametrize(
    ("group", "name", "value", "expected"),
    [
        (BiasSettings, "bias_epsilon", 0.0, "above 0"),
        (BiasSettings, "bias_gamma", float("nan"), "0 or more"),
        (ModelSettings, "pathology_encoder_depth", 0, "1 or more"),
        (ModelSettings, "decoder_dim", 100, "a positive multiple of 16"),
        (ModelSettings, "pathology_std", (0.2, 0.2, 0.0), "above 0"),
        (LossSettings, "focal_weight", 2.0, "at most 1"),
        (LossSettings, "iou_weight", -1.0, "0 or more"),
        (OptimizationSettings, "epochs", 0, "1 or more"),
        (OptimizationSettings, "batch_size", 0, "1 or more"),
        (OptimizationSettings, "accumulate_batches", 0, "1 or more"),
        (OptimizationSettings, "learning_rate", -1.0, "above 0"),
        (OptimizationSettings, "seed", -1, "0 or more"),
        (AugmentationSettings, "crop_scale_min", 2.0, "above 0, at most 1"),
        (AugmentationSettings, "color_jitter", 0.6, "at most 0.5"),
        (RuntimeSettings, "devices", 0, "1 or more"),
        (BenchmarkSettings, "repeats", 0, "at least 1"),
    ],
)
def test_a_number_that_cannot_be_is_refused_with_what_is_expected(
    group: type, name: str, value: object, expected: str
):
    with pytest.raises(FocalPathError, match=f"{name} is .*{expected}"):
        group(**{name: value})


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_within_its_own_bounds(preset: str):
    assert PRESETS[preset]().preset == preset


@pytest.mark.parametrize(
    ("command", "choices"),
    [
        (
            "fit",
            [
                "-gamma log f is our choice",
                "gamma log C d, with d the share of 1 - Dice, is our choice",
            ],
        ),
        (
            "fit bdsa",
            [
                "synthetic preset's 10 is our choice",
                "Magnitude of the prior, the same for all strategies (our choice)",
                "as for BCSS (our choice)",
            ],
        ),
        ("prepare bdsa", ["for BDSA 0.25 is our choice", "has no fold (our choice)"]),
    ],
)
def test_the_help_says_which_values_are_our_choice(
    command: str,
    choices: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(sys, "argv", ["train", *command.split(), "--help"])
    with pytest.raises(SystemExit):
        main()
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for choice in choices:
        assert choice in text
