from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.toy_data import toy_settings
from train.fitting.task import SegmentationTask
from train.model.segmenter import Segmenter
from train.settings import LabelClass, Settings

CLASSES = tuple(LabelClass(name=name, color="#000000") for name in "AB")


def task_of(settings: Settings) -> SegmentationTask:
    return SegmentationTask(Segmenter(settings.model, len(CLASSES)), settings, CLASSES)


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.0), ("constant", 1.0)])
def test_the_learning_rate_ends_as_the_schedule_says(schedule: Any, last: float):
    optimization = {"schedule": schedule, "warmup_steps": 4}
    task: Any = task_of(toy_settings(optimization=optimization))
    task._trainer = SimpleNamespace(estimated_stepping_batches=20)
    factor = task.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[0]
    assert factor(0) == 0.25
    assert factor(4) == pytest.approx(1.0)
    assert factor(20) == pytest.approx(last)


def test_a_step_pulls_the_bias_to_its_prior_by_its_own_learning_rate():
    settings = toy_settings(
        bias={"bias_lr_factor": 100.0, "bias_decay": 0.2},
        optimization={"learning_rate": 1e-3, "warmup_steps": 4},
    )
    task: Any = task_of(settings)
    class_bias = task.segmenter.class_attention_bias
    class_bias.start(torch.tensor([0.5, -0.5]), learned=True)
    with torch.no_grad():
        class_bias.delta.copy_(torch.tensor([1.5, 0.5]))
    class_bias.delta.grad = torch.zeros(2)  # the loss says nothing
    task._trainer = SimpleNamespace(estimated_stepping_batches=20)
    configured = task.configure_optimizers()
    configured["optimizer"].step()
    left = 1 - 0.2 * (100 * 1e-3 / 4)  # the first of four steps of warm-up
    assert class_bias.delta.tolist() == pytest.approx([0.5 + left, -0.5 + left], abs=1e-6)


@pytest.mark.parametrize(
    ("regularisation", "survives"), [("decay", True), ("off", True), ("l2", False)]
)
def test_a_warm_start_survives_the_decay_and_not_the_l2_term(regularisation: str, survives: bool):
    """Steps of the optimiser with a gradient from the regularisation alone, as in a long run."""
    prior = torch.tensor([0.6, -0.5])
    task: Any = task_of(toy_settings(bias={"bias_regularisation": regularisation}))
    task.segmenter.class_attention_bias.start(prior, learned=True)
    task._trainer = SimpleNamespace(estimated_stepping_batches=400)
    optimizer = task.configure_optimizers()["optimizer"]
    delta = task.segmenter.class_attention_bias.delta
    for _ in range(400):
        penalty = task.bias_penalty()
        optimizer.zero_grad()
        (penalty + 0 * delta.sum()).backward()
        optimizer.step()
    kept = float(delta.detach().abs().max() / prior.abs().max())
    assert (kept > 0.95) == survives
    assert survives or kept < 0.3


def test_the_bias_has_its_own_learning_rate_and_no_weight_decay():
    task: Any = task_of(toy_settings(optimization={"weight_decay": 0.3}))
    task._trainer = SimpleNamespace(estimated_stepping_batches=10)
    weights, bias = task.configure_optimizers()["optimizer"].param_groups
    assert bias["params"] == [task.segmenter.class_attention_bias.delta]
    assert bias["initial_lr"] == pytest.approx(10 * weights["initial_lr"])
    assert bias["weight_decay"] == 0.0
    assert weights["weight_decay"] == 0.3


@pytest.mark.parametrize("regularisation", ["off", "l2"])
def test_nothing_pulls_the_bias_to_its_prior_unless_that_is_asked_for(regularisation: str):
    bias = {"bias_regularisation": regularisation, "bias_decay": 0.5, "bias_lr_factor": 100.0}
    task: Any = task_of(toy_settings(bias=bias))
    class_bias = task.segmenter.class_attention_bias
    class_bias.start(torch.tensor([0.5, -0.5]), learned=True)
    with torch.no_grad():
        class_bias.delta.add_(1)
    class_bias.delta.grad = torch.zeros(2)
    task._trainer = SimpleNamespace(estimated_stepping_batches=20)
    configured = task.configure_optimizers()
    configured["optimizer"].step()
    assert class_bias.delta.tolist() == [1.5, 0.5]


def test_the_scores_of_an_epoch_are_of_that_epoch_alone(monkeypatch: pytest.MonkeyPatch):
    task = task_of(toy_settings())
    logged: dict[str, float] = {}
    monkeypatch.setattr(task, "log", lambda name, value, **_: logged.update({name: value}))
    target = torch.tensor([[[1, 2]]])
    for predicted, dice in ((3 - target, 0), (target, 1)):
        task.confusion.update(predicted, target)
        task.on_validation_epoch_end()
        assert logged["validation/dice/mean"] == dice
