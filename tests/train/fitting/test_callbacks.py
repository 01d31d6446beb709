from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train.fitting.callbacks
from tests.support.toy_data import toy_settings
from train.fitting.callbacks import BestCheckpoint
from train.fitting.task import SegmentationTask
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
