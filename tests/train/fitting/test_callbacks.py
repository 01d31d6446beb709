from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel

import train.fitting.callbacks
from tests.support.toy_data import toy_settings
from train.fitting.callbacks import BestCheckpoint, EpochProgressBar
from train.fitting.task import SegmentationTask
from train.fitting.trainer import make_trainer
from train.model.segmenter import Segmenter
from train.settings import LabelClass, Settings

CLASSES = tuple(LabelClass(name=name, color="#000000") for name in "AB")


def task_of(settings: Settings) -> SegmentationTask:
    return SegmentationTask(Segmenter(settings.model, len(CLASSES)), settings, CLASSES)


@pytest.mark.parametrize(("keep", "kept"), [("best", [0.2, 0.5]), ("last", [0.2, 0.5, 0.4])])
def test_the_run_keeps_the_best_or_the_last_epoch(
    keep: Any, kept: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    written: list[float] = []
    monkeypatch.setattr(
        train.fitting.callbacks,
        "save_checkpoint",
        lambda run, segmenter, card: written.append(card["metrics"]["dice/mean"]),
    )
    callback, task = BestCheckpoint(tmp_path, partial(dict), keep), task_of(toy_settings())
    for dice in (0.2, 0.5, 0.4):
        metrics = {"validation/dice/mean": torch.tensor(dice)}
        trainer: Any = SimpleNamespace(callback_metrics=metrics, is_global_zero=True)
        callback.on_validation_end(trainer, task)
    assert written == pytest.approx(kept)
    assert callback.state_dict()["best_dice"] == pytest.approx(0.5)


def test_the_progress_bar_counts_epochs_from_1(tmp_path: Path):
    bar, seen = EpochProgressBar(), []

    class Reader(Callback):
        def on_train_batch_start(self, *_: object) -> None:
            assert bar.progress is not None
            seen.append(bar.progress.tasks[0].description.split("]")[-1].strip())

    trainer = make_trainer(
        tmp_path,
        [bar, Reader()],
        devices=1,
        max_epochs=2,
        limit_train_batches=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(BoringModel())
    assert seen == ["Epoch 1/2", "Epoch 2/2"]
