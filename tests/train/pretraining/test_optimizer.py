"""The optimizer's groups and schedules, against DINO's by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from train.pretraining.optimizer import half_cosine, make_optimizer
from train.pretraining.settings import ScheduleSettings

SCHEDULE = ScheduleSettings(
    steps=40,
    steps_per_epoch=10,
    batch_size=128,
    devices=2,
    learning_rate=8e-4,
    warmup_share=0.25,
    final_learning_rate_share=0.1,
    weight_decay=(0.04, 0.4),
)


def _rates(schedule: ScheduleSettings) -> list[float]:
    optimizer, scheduler = make_optimizer(nn.Linear(2, 2), schedule)
    rates = []
    for _ in range(schedule.steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_the_learning_rate_rises_to_the_batchs_and_falls_along_a_cosine() -> None:
    peak = 8e-4 * np.sqrt(2 * 128 / 1024)  # by the root of all processes' samples
    rise = peak * np.arange(1, 11) / 10
    last = 0.1 * peak
    fall = last + 0.5 * (peak - last) * (1 + np.cos(np.pi * np.arange(30) / 30))
    assert _rates(SCHEDULE) == pytest.approx([*rise, *fall])
    assert max(_rates(replace(SCHEDULE, scale_learning_rate=False))) == pytest.approx(8e-4)


def test_norms_and_biases_do_not_decay() -> None:
    student = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    optimizer, _ = make_optimizer(student, SCHEDULE)
    decaying, others = optimizer.param_groups
    assert [p is student[0].weight for p in decaying["params"]] == [True]
    assert len(others["params"]) == 3
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.04, 0.0)


def test_a_frozen_weight_is_in_no_group() -> None:
    student = nn.Linear(3, 2)
    student.bias.requires_grad_(False)
    optimizer, _ = make_optimizer(student, SCHEDULE)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 1


def test_the_half_cosine_falls_from_one_to_zero() -> None:
    assert [half_cosine(p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert torch.tensor([half_cosine(p / 9) for p in range(10)]).diff().lt(0).all()
