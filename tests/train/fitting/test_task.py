from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.toy_data import toy_settings
from train.fitting.task import SegmentationTask
from train.model.segmenter import Segmenter
from train.settings import LabelClass, Settings

CLASSES = tuple(LabelClass(name=name, color="#000000") for name in "AB")


def task_of(settings: Settings) -> SegmentationTask:
    return SegmentationTask(Segmenter(settings.model, len(CLASSES)), settings, CLASSES)


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.0), ("constant", 1.0)])
def test_the_learning_rate_ends_as_the_schedule_says(schedule: Any, last: float):
    settings = toy_settings()
    optimization = replace(settings.optimization, schedule=schedule, warmup_steps=4)
    task: Any = task_of(replace(settings, optimization=optimization))
    task._trainer = SimpleNamespace(estimated_stepping_batches=20)
    factor = task.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[0]
    assert factor(0) == 0.25
    assert factor(4) == pytest.approx(1.0)
    assert factor(20) == pytest.approx(last)
