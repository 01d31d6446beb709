import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

import train.fitting.run
from tests.support.commands import run_train
from tests.support.errors import raises
from tests.support.locks import break_locks
from tests.support.meanwhile import before_call
from tests.support.toy_data import changed, rows_of, toy_settings
from train.config import read_settings
from train.data.folder import read_tile_folder
from train.data.pixels import class_frequencies
from train.errors import (
    CheckpointError,
    DestinationError,
    MissingPackageError,
    RunError,
    SettingsError,
    StorageError,
)
from train.fitting.metrics_file import read_metrics
from train.fitting.run import fit
from train.fitting.run_lock import only_run
from train.fitting.task import SegmentationTask
from train.model.checkpoint import load_checkpoint, read_card, save_checkpoint
from train.model.class_bias import ClassStatistics, centred_prior
from train.model.segmenter import Segmenter
from train.settings import BiasSettings


def test_a_run_logs_and_draws_loss_dice_iou_and_bias_of_every_epoch(toy_run: Path):
    rows = rows_of(toy_run)
    columns = {"loss", "dice_loss", "focal_loss", "iou_loss", "bias/Tumor", "validation/iou/Other"}
    assert all(columns <= row.keys() for row in rows)
    assert [row["epoch"] for row in rows] == [1, 2]
    with Image.open(toy_run / "training.png") as figure:
        assert figure.width > figure.height > 300


@pytest.mark.slow
def test_a_folder_with_a_trained_model_is_not_overwritten_unasked(toy_data: Path, tmp_path: Path):
    settings = toy_settings(optimization={"epochs": 1})
    run = tmp_path / "run"
    fit(settings, toy_data, run)
    (run / "last.ckpt").unlink()
    before = (run / "model.safetensors").read_bytes()
    with raises(DestinationError, run, "--overwrite"):
        fit(settings, toy_data, run)
    with raises(RunError, "last.ckpt"):
        fit(settings, toy_data, run, resume=True)
    assert (run / "model.safetensors").read_bytes() == before
    other = changed(settings, optimization={"seed": 7})
    (run / ".model.safetensors.partial-0").touch()  # as one that was killed leaves
    fit(other, toy_data, run, overwrite=True)
    assert (run / "model.safetensors").read_bytes() != before
    assert not list(run.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("may", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_in_which_another_process_trains_is_left_alone(
    may: dict[str, bool], run_copy: Path, toy_data: Path
):
    if not may:
        (run_copy / "model.safetensors").unlink()  # the other has just begun
    before = {path: path.stat().st_mtime_ns for path in run_copy.iterdir()}
    with only_run(run_copy, is_first=True):
        with raises(RunError, run_copy):
            fit(toy_settings(), toy_data, run_copy, **may)
        with only_run(run_copy, is_first=False):  # another process of the same training
            pass
    assert {path: path.stat().st_mtime_ns for path in run_copy.iterdir()} == before


class _StoppedError(Exception):
    pass


def test_a_later_process_of_another_training_takes_nothing_away(
    run_copy: Path, toy_data: Path, monkeypatch: pytest.MonkeyPatch
):
    """As torchrun and srun start it beside the first, which finds that the folder is taken."""
    (run_copy / ".last.ckpt.partial-0").touch()  # which the training writes
    before = {path: path.stat().st_mtime_ns for path in run_copy.iterdir()}

    def stopped(*_: object, **__: object) -> None:
        raise _StoppedError

    later = SimpleNamespace(is_global_zero=False, fit=stopped)
    monkeypatch.setattr(train.fitting.run, "trainer_of", lambda *_: later)
    monkeypatch.setattr(train.fitting.run, "make_loaders", lambda *_: ())
    with pytest.raises(_StoppedError):
        fit(toy_settings(), toy_data, run_copy, overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in run_copy.iterdir()} == before


@pytest.mark.slow
def test_a_run_is_resumed_where_another_process_left_it_meanwhile(
    run_copy: Path, toy_data: Path, monkeypatch: pytest.MonkeyPatch
):
    epochs = iter((1, 2))
    monkeypatch.setattr(train.fitting.run, "resumed_epoch", lambda *_: next(epochs))
    begun: list[int] = []

    def loaders(*arguments: object) -> None:
        begun.append(int(str(arguments[4])))
        raise _StoppedError

    monkeypatch.setattr(train.fitting.run, "make_loaders", loaders)
    with pytest.raises(_StoppedError):
        fit(toy_settings(), toy_data, run_copy, resume=True)
    assert begun == [2]


def test_where_the_file_system_has_no_locks_a_run_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    break_locks(monkeypatch, errno.ENOLCK)
    with only_run(tmp_path, is_first=True), only_run(tmp_path, is_first=True):
        pass


def test_a_run_that_failed_frees_its_folder(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), only_run(tmp_path, is_first=True):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with only_run(tmp_path, is_first=True):
        pass


@pytest.mark.slow
def test_a_run_writes_its_settings_and_another_goes_on_from_it(
    toy_run: Path, toy_data: Path, tmp_path: Path
):
    settings = read_settings(toy_run / "run.yaml")
    assert settings == read_card(toy_run).settings
    settings = changed(
        settings,
        weights={"from_run": str(toy_run)},
        loss={"class_weights": "sqrt"},
        optimization={"sampling": "balanced", "epochs": 1, "learning_rate": 1e-9},
    )
    fit(settings, toy_data, tmp_path / "run")
    before = load_file(toy_run / "model.safetensors")
    after = load_file(tmp_path / "run" / "model.safetensors")
    for name in ("neck.0.weight", "class_attention_bias.delta"):
        torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=0)
    assert read_card(tmp_path / "run").origins


def test_a_run_is_not_begun_with_the_settings_of_one_model_and_the_weights_of_another(
    run_copy: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    segmenter, card = load_checkpoint(run_copy)
    next(segmenter.parameters()).data += 1
    before_call(
        monkeypatch,
        train.fitting.run,
        "require_trainable",
        lambda: save_checkpoint(run_copy, segmenter, card),
    )
    settings = changed(card.settings, weights={"from_run": str(run_copy)})
    with raises(CheckpointError, run_copy, "other weights now"):
        fit(settings, toy_data, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_earlier_run_and_published_weights_exclude_each_other(
    toy_run: Path, toy_data: Path, tmp_path: Path
):
    weights = {"from_run": str(toy_run), "sam_weights": "sam.pth"}
    with raises(SettingsError, "--sam-weights"):
        fit(toy_settings(weights=weights), toy_data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_too_large_to_be_exported_is_refused_before_training(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    weights = Segmenter(toy_settings().model, 5).state_dict()
    num_bytes = 4 * sum(value.numel() for value in weights.values())
    monkeypatch.setattr("train.fitting.run.MAX_WEIGHTS_BYTES", num_bytes - 1)
    with raises(SettingsError, "--no-exportable"):
        fit(toy_settings(), toy_data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, hidden by it
def test_a_compiled_run_learns_what_an_eager_one_learns(
    toy_run: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Traced as for the default backend, whose C++ takes minutes to build.
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compile_module, backend="eager"))
    fit(toy_settings(runtime={"compile": True}), toy_data, tmp_path / "compiled")
    eager = load_file(toy_run / "model.safetensors")
    compiled = load_file(tmp_path / "compiled" / "model.safetensors")
    assert eager.keys() == compiled.keys()
    name = "mask_decoder.mask_tokens.weight"
    torch.testing.assert_close(compiled[name], eager[name], atol=2e-3, rtol=0)


def assert_resumed_ends_as(unbroken: Path, run: Path, data: Path, num_workers: int) -> None:
    assert len(rows_of(run)) == 1
    settings = toy_settings(augmentation={"num_workers": num_workers})
    steps: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            SegmentationTask,
            "on_train_batch_start",
            lambda task, *_: steps.append(task.global_step),
        )
        fit(settings, data, run, resume=True)
    assert steps == [2, 3], "the first epoch is not trained again"
    first, second = (
        torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (unbroken, run)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read_metrics(run / "metrics.csv") == read_metrics(unbroken / "metrics.csv")


_KILLED_RUN = """
import os, signal, sys
from pathlib import Path

import torch

from tests.support.toy_data import toy_settings
from train.fitting.run import fit
from train.fitting.task import SegmentationTask

def kill_in_the_second_epoch(task, *_):
    if task.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
SegmentationTask.on_train_batch_start = kill_in_the_second_epoch
fit(toy_settings(augmentation={"num_workers": 2}), Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_run_killed_in_mid_epoch_and_resumed_ends_as_an_unbroken_one(
    toy_run: Path, toy_data: Path, tmp_path: Path
):
    run = tmp_path / "run"
    killed = subprocess.run([sys.executable, "-c", _KILLED_RUN, str(toy_data), str(run)])
    assert killed.returncode == -signal.SIGKILL
    assert_resumed_ends_as(toy_run, run, toy_data, num_workers=2)


@pytest.mark.slow
def test_a_run_that_an_error_ends_can_be_resumed_the_same(
    toy_run: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail_in_the_second_epoch(task: SegmentationTask, *_: object) -> None:
        if task.global_step == 3:
            raise MemoryError

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(SegmentationTask, "on_train_batch_start", fail_in_the_second_epoch)
        with pytest.raises(MemoryError):
            fit(toy_settings(), toy_data, run)
    assert_resumed_ends_as(toy_run, run, toy_data, num_workers=0)


@pytest.mark.slow
def test_a_learned_bias_moves_and_a_frozen_one_stays_at_its_prior(
    toy_run: Path, toy_data: Path, tmp_path: Path
):
    folder = read_tile_folder(toy_data)
    prior = centred_prior(BiasSettings(), ClassStatistics(class_frequencies(folder))).tolist()
    fit(toy_settings(bias={"bias_frozen": True}), toy_data, tmp_path / "frozen")
    _, learned_card = load_checkpoint(toy_run)
    _, frozen_card = load_checkpoint(tmp_path / "frozen")
    assert list(frozen_card.class_attention_bias) == pytest.approx(prior)
    assert list(learned_card.class_attention_bias) != pytest.approx(prior, abs=1e-4)


def test_a_loss_that_is_not_a_number_names_step_tiles_and_remedy(toy_data: Path, tmp_path: Path):
    settings = toy_settings(optimization={"learning_rate": 1e30})
    with raises(RunError, "--learning-rate (now 1e+30)", "tile"):
        fit(settings, toy_data, tmp_path / "run")


@pytest.mark.slow
def test_accumulated_batches_learn_what_a_larger_batch_does(toy_data: Path, tmp_path: Path):
    rows = []
    for batch_size, batches in ((4, 1), (2, 2)):
        optimization = {"batch_size": batch_size, "accumulate_batches": batches}
        settings = toy_settings(loss={"dice_per_image": True}, optimization=optimization)
        fit(settings, toy_data, tmp_path / str(batch_size))
        rows.append(rows_of(tmp_path / str(batch_size)))
    for large, small in zip(*rows, strict=True):
        assert small == pytest.approx(large, abs=1e-3)


@pytest.mark.slow
def test_the_checkpoint_has_the_scale_that_the_network_saw_and_doubts_are_told(
    data_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copy(data_copy / "img" / "tile0.png", data_copy / "img" / "tile11.png")  # of the test
    with Image.open(data_copy / "img" / "tile1.png") as image:
        image.save(data_copy / "img" / "tile1.png", dpi=(101_600, 101_600))  # 0.25 um
    card = fit(toy_settings(model={"mpp": 1.0}), data_copy, tmp_path / "run")
    assert card.mpp == card.settings.model.mpp == 1.0
    told = " ".join(capsys.readouterr().out.split())
    assert "tile0.png (training) and tile11.png (test)" in told
    assert "1 files state another um per pixel, such as tile1.png (0.25" in told


@pytest.mark.slow
def test_a_run_that_cannot_be_written_is_told(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()
    with raises(StorageError, tmp_path / "file" / "run", "Not a directory"):
        fit(toy_settings(), toy_data, tmp_path / "file" / "run")

    def full(*_: object) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("train.model.checkpoint.save_file", full)
    with raises(StorageError, tmp_path / "run", "No space left"):
        fit(toy_settings(), toy_data, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "step", "told"),
    [
        (signal.SIGINT, 3, r"interrupted; .*--resume.*last.ckpt.*\n"),
        (signal.SIGTERM, 3, r"interrupted; .*--resume.*last.ckpt.*\n"),
        (signal.SIGTERM, 1, r"interrupted; .*there is nothing to resume\n"),
    ],
)
def test_an_interrupted_training_says_how_to_go_on(
    toy_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    step: int,
    told: str,
):
    def interrupt(task: SegmentationTask, *_: object) -> None:
        if task.global_step == step:
            signal.raise_signal(number)

    monkeypatch.setattr(SegmentationTask, "on_train_batch_start", interrupt)
    size = ("--tile-size-px", 64, "--pathology-encoder-depth", 1, "--decoder-dim", 32)
    folders = ("--data", toy_data, "--out", tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        run_train("fit", "synthetic", *size, *folders)
    assert end.value.code == 128 + number
    assert re.fullmatch(told, capsys.readouterr().err)


@pytest.mark.slow
def test_lightning_does_not_take_sigterm_over(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    handlers = []

    def note_handler(*_: object) -> None:
        handlers.append(signal.getsignal(signal.SIGTERM))

    monkeypatch.setattr(SegmentationTask, "on_train_batch_start", note_handler)
    fit(toy_settings(optimization={"epochs": 1}), toy_data, tmp_path / "run")
    assert set(handlers) == {signal.getsignal(signal.SIGTERM)}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("_terminal")
def test_an_interrupted_preparation_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
):
    def interrupt(*_: object, **__: object) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr("train.data.synthetic.dataset.write_description", interrupt)
    arguments = ("--num-train", 1, "--num-validation", 1, "--num-test", 1, "--tile-size-px", 64)
    with pytest.raises(SystemExit) as end:
        run_train("prepare", "synthetic", tmp_path / "data", *arguments)
    assert end.value.code == 128 + number
    assert "interrupted; a data set is written whole or not at all" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("track", "given"),
    [("mlflow", None), ("mlflow", "http://127.0.0.1:5000"), ("tensorboard", None)],
)
def test_a_tracker_that_is_not_installed_says_what_to_install(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, track: str, given: str | None
):
    asked: list[str] = []

    def missing(*_: object, tracking_uri: str = "", **__: object) -> None:
        asked.append(tracking_uri)
        assert track != "mlflow" or os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
        raise ModuleNotFoundError(f"No module named {track!r}", name=track)

    for logger in ("MLFlowLogger", "TensorBoardLogger"):
        monkeypatch.setattr(f"train.fitting.trainer.{logger}", missing)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if given:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    with raises(MissingPackageError, f"pip install {track}"):
        fit(toy_settings(runtime={"track": track}), toy_data, tmp_path / "run")
    assert asked == [(given or "sqlite:///mlflow.db") if track == "mlflow" else ""]
