"""One step of distillation: its schedules, its teacher, and the pairs of the dense alignment."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.tiny_pretraining import tiny_pretraining
from train.pretraining.optimizer import make_optimizer
from train.pretraining.settings import PretrainSettings
from train.pretraining.task import PretrainTask

STEPS = 100


def _settings() -> PretrainSettings:
    base = tiny_pretraining(steps=STEPS, steps_per_epoch=10, weight_decay=(0.04, 0.4))
    distillation = replace(
        base.distillation,
        teacher_temperature=(0.04, 0.07),
        teacher_momentum=0.9,
        frozen_prototypes=0.2,
        align_weight=3.0,
        ibot_weight=5.0,
        spread_weight=0.1,
    )
    return replace(base, distillation=distillation)


@pytest.fixture
def task() -> Any:
    torch.manual_seed(0)
    return PretrainTask(_settings())


def _at(task: Any, step: int) -> Any:
    task._trainer = SimpleNamespace(global_step=step, global_rank=0)
    return task


def test_the_teachers_temperature_rises_over_the_first_30_percent(task: Any) -> None:
    found = [_at(task, step)._teacher_temperature() for step in (0, 15, 30, 99)]
    assert found == pytest.approx([0.04, 0.055, 0.07, 0.07])


def test_the_weight_decay_rises_along_a_cosine_and_the_prototypes_wait(task: Any) -> None:
    optimizer, _ = make_optimizer(task.student, task.settings.schedule)
    heads = task.student.cls_head, task.student.dense_head
    decays, waiting = [], []
    for step in (0, 19, 20, 50, 100):
        for head in heads:
            head.prototypes.grad = torch.ones_like(head.prototypes)
        _at(task, step).on_before_optimizer_step(optimizer)
        decays.append(optimizer.param_groups[0]["weight_decay"])
        waiting.append([head.prototypes.grad is None for head in heads])
    by_hand = 0.4 + 0.5 * (0.04 - 0.4) * (1 + np.cos(np.pi * np.array([0, 0.19, 0.2, 0.5, 1])))
    assert decays == pytest.approx(by_hand.tolist())
    assert waiting == [[True] * 2, [True] * 2, [False] * 2, [False] * 2, [False] * 2]
    assert optimizer.param_groups[1]["weight_decay"] == 0


@pytest.mark.parametrize(("step", "momentum"), [(0, 0.9), (50, 0.95), (100, 1.0)])
def test_the_teacher_follows_with_a_momentum_that_rises_to_one(
    task: Any, step: int, momentum: float
) -> None:
    with torch.no_grad():
        for parameter in task.student.parameters():
            parameter.add_(1.0)
    before = [p.clone() for p in task.teacher.parameters()]
    _at(task, step).on_train_batch_end(None, None, 0)
    for old, teacher in zip(before, task.teacher.parameters(), strict=True):
        assert torch.allclose(teacher, old + (1 - momentum), atol=1e-6)


def test_a_loss_is_the_sum_of_its_weighted_terms(task: Any, monkeypatch: Any) -> None:
    terms = {"context": 1.0, "alignment": 10.0, "ibot": 100.0, "spread": 1000.0}
    parts = {name: torch.tensor(value) for name, value in terms.items()}
    monkeypatch.setattr(task, "_losses", lambda batch: parts)
    monkeypatch.setattr(task, "_log_mean", lambda *args, **rest: None)
    assert float(task.training_step(None, 0)) == pytest.approx(1 + 30 + 500 + 100)
    monkeypatch.setattr(task, "_losses", lambda batch: {"context": torch.tensor(2.0)})
    assert float(task.training_step(None, 0)) == 2


def test_the_alignment_pairs_each_fine_view_with_its_place_in_each_coarse_view(task: Any) -> None:
    """Against the definition, pair by pair; the scales' centres tell them apart."""
    samples, fine_views, grid, width = 3, 2, 3, 32
    random = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    weights = draw(samples, 2, fine_views, grid, grid).flatten(3).softmax(-1)
    weights = weights.unflatten(3, (grid, grid))
    taught, seen = (
        [(draw(samples, width), draw(samples, grid**2, width)) for _ in range(2)] for _ in range(2)
    )
    details = [draw(samples, width) for _ in range(fine_views)]
    fine_pictures = draw(fine_views, samples, 3, 48, 48)
    task.dense_centers.center.copy_(draw(*task.dense_centers.center.shape) * 0.1)
    centers, temperature = task.dense_centers.center.clone(), 0.05
    teacher, student = task.teacher.dense_head, task.student.dense_head
    with torch.no_grad():
        of_fine, _ = task.teacher(fine_pictures.flatten(0, 1))
        of_fine = of_fine.unflatten(0, (fine_views, samples))
        terms, places = [], []
        for b in range(samples):
            for a in range(2):
                for f in range(fine_views):
                    share = weights[b, a, f].flatten()
                    place = teacher(share @ taught[a][1][b])
                    places.append(place)
                    detail = teacher(of_fine[f, b])
                    down = _cross_entropy(
                        (place - centers[0]) / temperature, student(details[f][b])
                    )
                    up = _cross_entropy(
                        (detail - centers[1 + f]) / temperature, student(share @ seen[a][1][b])
                    )
                    terms.append((down + up) / 2)
        fine_seen = [(cls, None) for cls in details]
        found = task._alignment(weights, taught, seen, fine_seen, fine_pictures, temperature)
        assert float(found) == pytest.approx(float(torch.stack(terms).mean()), rel=1e-4)
        task.dense_centers.move()
        means = [torch.stack(places).mean(0), *(teacher(of_fine[f]).mean(0) for f in range(2))]
    expected = 0.9 * centers + 0.1 * torch.stack(means)
    assert torch.allclose(task.dense_centers.center, expected, atol=1e-5)


def _cross_entropy(teacher: Tensor, student: Tensor) -> Tensor:
    return -(teacher.softmax(-1) * F.log_softmax(student / 0.1, dim=-1)).sum()
