import csv
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.toy_data import toy_settings
from train.checkpoint import load_checkpoint
from train.dataset import class_frequencies, read_tile_folder
from train.errors import FocalPathError
from train.fit import evaluate, fit
from train.focal_attention import initial_bias
from train.segmenter import Segmenter
from train.settings import BiasSettings, RuntimeSettings, bcss, bdsa, crag
from train.task import SegmentationTask


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_logs_loss_dice_iou_and_bias_of_every_epoch(toy_run: Path):
    rows = rows_of(toy_run)
    columns = {"loss", "dice_loss", "focal_loss", "iou_loss", "bias/Tumor", "validation/iou/Other"}
    for column in columns:
        assert all(float(row[column]) is not None for row in rows)
    assert [row["epoch"] for row in rows] == ["0", "1"]


def test_a_folder_with_a_trained_model_is_not_overwritten_unasked(toy_data: Path, tmp_path: Path):
    settings = toy_settings()
    settings = replace(settings, optimization=replace(settings.optimization, epochs=1))
    run = tmp_path / "run"
    fit(settings, toy_data, run)
    (run / "last.ckpt").unlink()
    before = (run / "model.safetensors").read_bytes()
    with pytest.raises(FocalPathError, match="has a trained model.*--overwrite"):
        fit(settings, toy_data, run)
    with pytest.raises(FocalPathError, match="nothing to resume.*--overwrite"):
        fit(settings, toy_data, run, resume=True)
    assert (run / "model.safetensors").read_bytes() == before
    other = replace(settings, optimization=replace(settings.optimization, seed=7))
    fit(other, toy_data, run, overwrite=True)
    assert (run / "model.safetensors").read_bytes() != before


def test_the_loss_falls(toy_data: Path, tmp_path: Path):
    settings = toy_settings()
    settings = replace(
        settings, optimization=replace(settings.optimization, epochs=15, learning_rate=5e-3)
    )
    fit(settings, toy_data, tmp_path / "run")
    losses = [float(row["loss"]) for row in rows_of(tmp_path / "run") if row["loss"]]
    assert losses[-1] < losses[0] - 0.1


def test_same_seed_same_result(toy_run: Path, toy_data: Path, tmp_path: Path):
    fit(toy_settings(), toy_data, tmp_path / "again")
    first = load_file(toy_run / "model.safetensors")
    second = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert rows_of(toy_run) == rows_of(tmp_path / "again")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, hidden by it
def test_a_compiled_run_learns_what_an_eager_one_learns(
    toy_run: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Traced as for the default backend, whose C++ takes minutes to build.
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compile_module, backend="eager"))
    settings = replace(toy_settings(), runtime=RuntimeSettings(compile=True))
    fit(settings, toy_data, tmp_path / "compiled")
    eager = load_file(toy_run / "model.safetensors")
    compiled = load_file(tmp_path / "compiled" / "model.safetensors")
    assert eager.keys() == compiled.keys()
    name = "mask_decoder.mask_tokens.weight"
    torch.testing.assert_close(compiled[name], eager[name], atol=2e-3, rtol=0)


_KILLED_RUN = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path

import torch

from tests.toy_data import toy_settings
from train.fit import fit
from train.task import SegmentationTask

def kill_in_the_second_epoch(task, *_):
    if task.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
SegmentationTask.on_train_batch_start = kill_in_the_second_epoch
augmentation = replace(toy_settings().augmentation, num_workers=int(sys.argv[3]))
fit(toy_settings(augmentation=augmentation), Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_killed_in_mid_epoch_and_resumed_ends_as_an_unbroken_one(
    toy_run: Path, toy_data: Path, tmp_path: Path, num_workers: int
):
    run = tmp_path / "run"
    arguments = [str(toy_data), str(run), str(num_workers)]
    killed = subprocess.run([sys.executable, "-c", _KILLED_RUN, *arguments])
    assert killed.returncode == -signal.SIGKILL
    assert len(rows_of(run)) == 1
    augmentation = replace(toy_settings().augmentation, num_workers=num_workers)
    fit(toy_settings(augmentation=augmentation), toy_data, run, resume=True)
    unbroken, resumed = (
        torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (toy_run, run)
    )
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    assert rows_of(run) == rows_of(toy_run)


def test_a_learned_bias_moves_and_a_frozen_one_stays_at_its_prior(
    toy_run: Path, toy_data: Path, tmp_path: Path
):
    folder = read_tile_folder(toy_data)
    prior = initial_bias(BiasSettings(), class_frequencies(folder)).tolist()
    frozen = replace(toy_settings(), bias=BiasSettings(bias_frozen=True))
    fit(frozen, toy_data, tmp_path / "frozen")
    _, learned_card = load_checkpoint(toy_run)
    _, frozen_card = load_checkpoint(tmp_path / "frozen")
    assert list(frozen_card.class_attention_bias) == pytest.approx(prior)
    assert list(learned_card.class_attention_bias) != pytest.approx(prior, abs=1e-4)


def test_the_bias_has_its_own_learning_rate_and_no_weight_decay():
    settings = toy_settings()
    task = SegmentationTask(Segmenter(settings, torch.zeros(5)), settings, ())

    class Trainer:
        estimated_stepping_batches = 10

    task.__dict__["_trainer"] = Trainer()
    task._fabric = None
    weights, bias = task.configure_optimizers()["optimizer"].param_groups
    assert bias["params"] == [task.segmenter.class_attention_bias.delta]
    assert bias["initial_lr"] == pytest.approx(10 * weights["initial_lr"])
    assert bias["weight_decay"] == 0.0
    assert weights["weight_decay"] == 1e-2


def test_a_loss_that_is_not_a_number_names_step_tiles_and_remedy(toy_data: Path, tmp_path: Path):
    settings = toy_settings()
    settings = replace(settings, optimization=replace(settings.optimization, learning_rate=1e30))
    with pytest.raises(FocalPathError, match=r"the loss is .* at step \d+.*tile.*--learning-rate"):
        fit(settings, toy_data, tmp_path / "run")


def test_the_best_checkpoint_is_scored_as_during_training(toy_run: Path, toy_data: Path):
    segmenter, card = load_checkpoint(toy_run)
    scores = evaluate(segmenter, card, toy_data, "validation")
    assert scores == pytest.approx(card.metrics, abs=1e-6)


def test_a_run_draws_its_figure(toy_run: Path):
    with Image.open(toy_run / "training.png") as figure:
        assert figure.width > figure.height > 300


def test_presets_have_the_papers_values():
    assert bcss().optimization.epochs == bdsa().optimization.epochs == 32
    assert (crag().optimization.epochs, crag().optimization.warmup_steps) == (60, 46)
    assert (crag().loss.focal_weight, crag().loss.iou_weight) == (0.125, 0.0)
    assert (bcss().loss.focal_weight, bcss().loss.iou_weight) == (0.25, 0.0625)
    assert bcss().bias.bias_lr_factor == 100


def test_training_stops_early_without_a_better_dice(toy_data: Path, tmp_path: Path):
    settings = toy_settings(runtime=RuntimeSettings(patience=1))
    # A rate this small changes no prediction: the first epoch stays the best.
    still = replace(settings.optimization, epochs=6, learning_rate=1e-12)
    fit(replace(settings, optimization=still), toy_data, tmp_path / "run")
    assert len(rows_of(tmp_path / "run")) == 2


@pytest.mark.parametrize("given", [None, "http://127.0.0.1:5000"])
def test_mlflow_gets_the_address_given_or_a_database(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None
):
    asked: list[str] = []

    def mlflow(*arguments: object, tracking_uri: str, **options: object) -> None:
        asked.append(tracking_uri)
        raise ModuleNotFoundError("No module named 'mlflow'", name="mlflow")

    monkeypatch.setattr("train.fit.MLFlowLogger", mlflow)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if given:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    settings = toy_settings(runtime=RuntimeSettings(track="mlflow"))
    with pytest.raises(FocalPathError, match="pip install mlflow"):
        fit(settings, toy_data, tmp_path / "run")
    assert asked == [given or "sqlite:///mlflow.db"]


def test_a_tracker_that_is_not_installed_says_what_to_install(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def missing(*arguments: object, **options: object) -> None:
        raise ModuleNotFoundError("No module named 'tensorboard'", name="tensorboard")

    monkeypatch.setattr("train.fit.TensorBoardLogger", missing)
    settings = toy_settings(runtime=RuntimeSettings(track="tensorboard"))
    with pytest.raises(FocalPathError, match="pip install tensorboard"):
        fit(settings, toy_data, tmp_path / "run")
