"""The optimizer of pretraining and its schedules (after DINO, arXiv 2104.14294)."""

import math
from typing import Any

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from train.pretraining.settings import ScheduleSettings


def make_optimizer(student: nn.Module, schedule: ScheduleSettings) -> tuple[AdamW, LambdaLR]:
    """AdamW over the student, with a linear warm-up and a cosine.

    The first parameter group decays; the second, norms and biases, does not.

    Args:
        student: the weights to train.
        schedule: steps, rates and decay.

    Returns:
        The optimizer, and a scheduler that counts steps.
    """
    trained = [p for p in student.parameters() if p.requires_grad]
    learning_rate = schedule.learning_rate
    if schedule.scale_learning_rate:
        learning_rate *= math.sqrt(schedule.batch_size * schedule.devices / 1024)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=learning_rate, weight_decay=schedule.weight_decay[0])
    warmup = round(schedule.warmup_share * schedule.steps)
    last = schedule.final_learning_rate_share

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, schedule.steps - warmup)
        return last + (1 - last) * half_cosine(min(1.0, progress))

    return optimizer, LambdaLR(optimizer, factor)


def half_cosine(progress: float) -> float:
    """Fall from 1 at progress 0 to 0 at progress 1, along a cosine."""
    return 0.5 * (1 + math.cos(math.pi * progress))
