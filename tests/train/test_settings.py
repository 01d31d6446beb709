import math

import pytest

from benchmarks.training_variants import BenchmarkSettings
from serve.contract.refusal import as_flag
from tests.support.commands import run_train
from tests.support.errors import raises
from train.errors import SettingsError
from train.presets import bcss, bdsa, crag
from train.settings import (
    AugmentationSettings,
    BiasSettings,
    LossSettings,
    ModelSettings,
    OptimizationSettings,
    RuntimeSettings,
    upgrade_settings,
)


@pytest.mark.parametrize(
    ("group", "name", "value", "expected"),
    [
        (BiasSettings, "bias_epsilon", 0.0, "more than 0"),
        (BiasSettings, "bias_gamma", float("nan"), "finite"),
        (ModelSettings, "pathology_encoder_depth", 0, "at least 1"),
        (ModelSettings, "decoder_dim", 100, "multiple of 16"),
        (ModelSettings, "tile_size_px", 100, "multiple of 16"),
        (ModelSettings, "pathology_std", (0.2, 0.2, 0.0), "more than 0"),
        (ModelSettings, "pathology_std", (58.4, 57.1, 57.4), "at most 1"),
        (ModelSettings, "pathology_mean", (123.7, 116.3, 103.5), "0 to 1"),
        (ModelSettings, "pathology_mean", (0.5, 0.5, math.nan), "0 to 1"),
        (LossSettings, "focal_weight", 2.0, "0 to 1"),
        (LossSettings, "iou_weight", -1.0, "at least 0"),
        (OptimizationSettings, "epochs", 0, "at least 1"),
        (OptimizationSettings, "batch_size", 0, "at least 1"),
        (OptimizationSettings, "accumulate_batches", 0, "at least 1"),
        (OptimizationSettings, "learning_rate", -1.0, "more than 0"),
        (OptimizationSettings, "seed", -1, "0 to 4294967295"),
        (AugmentationSettings, "crop_scale_min", 2.0, "at most 1"),
        (AugmentationSettings, "color_jitter", 0.6, "0 to 0.5"),
        (RuntimeSettings, "devices", 0, "at least 1"),
        (BenchmarkSettings, "repeats", 0, "at least 1"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_what_is_expected(
    group: type, name: str, value: object, expected: str
):
    with raises(SettingsError, f"{as_flag(name)} is {value}", expected) as caught:
        group(**{name: value})
    assert "\n" not in str(caught.value)


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
        ("prepare bdsa", ["for BDSA, 0.25 is our choice", "gives no fold (our choice)"]),
    ],
)
def test_the_help_says_which_values_are_our_choice(
    command: str, choices: list[str], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        run_train(*command.split(), "--help")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for choice in choices:
        assert choice in text


def test_settings_that_an_earlier_version_stored_keep_their_meaning():
    stored = {"model": {"bias": "dfa", "resize": "antialiased"}, "bias": {"bias_l2": 1e-4}}
    upgraded = upgrade_settings(stored)
    assert ModelSettings(**upgraded["model"]) == ModelSettings()
    assert upgraded["bias"]["bias_regularisation"] == "l2"
    assert stored["model"] == {"bias": "dfa", "resize": "antialiased"}


def test_presets_have_the_papers_values():
    assert bcss().optimization.epochs == bdsa().optimization.epochs == 32
    assert (crag().optimization.epochs, crag().optimization.warmup_steps) == (60, 46)
    assert (crag().loss.focal_weight, crag().loss.iou_weight) == (0.125, 0.0)
    assert (bcss().loss.focal_weight, bcss().loss.iou_weight) == (0.25, 0.0625)
    assert bcss().bias.bias_lr_factor == 100
