"""Signs that a teacher collapses: its output is the same for every view, or uniform."""

import math

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor

LEAST_ENTROPY = 0.1
"""A teacher whose mean output has less than this share of the largest entropy has collapsed."""


def signs_of_collapse(targets: Tensor, logits: Tensor, temperature: float) -> dict[str, Tensor]:
    """Measure the signs of a collapse.

    Args:
        targets: (V, B, K) float32 probabilities of the teacher for V views.
        logits: (V, B, K) of the student for the same views, before the temperature.
        temperature: the student's.

    Returns:
        `entropy_of_mean`: entropy of the mean target over the largest possible, in [0, 1]; near 0
        where one prototype takes all. `mean_entropy`: mean entropy of the targets, likewise; near 1
        where every target is uniform. `teacher_student_kl`: in nats.
    """
    largest = math.log(targets.shape[-1])
    flat = targets.flatten(0, 1)
    log_student = F.log_softmax(logits.float() / temperature, dim=-1)
    divergence = (targets * (targets.clamp(min=1e-12).log() - log_student)).sum(-1).mean()
    return {
        "entropy_of_mean": _entropy(_over_processes(flat.mean(dim=0))) / largest,
        "mean_entropy": _entropy(flat).mean() / largest,
        "teacher_student_kl": divergence,
    }


def _over_processes(values: Tensor) -> Tensor:
    """Mean over all processes of a run, so that they agree and end together."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    total = values.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def effective_rank(features: Tensor) -> Tensor:
    """RankMe (arXiv 2210.02885): exp of the entropy of normalised singular values.

    Args:
        features: (B, D); the rank is at most the smaller of the two.
    """
    values = torch.linalg.svdvals(features.float())
    return _entropy(values / values.sum().clamp(min=1e-12)).exp()


def _entropy(probabilities: Tensor) -> Tensor:
    """Entropy of the last dimension, in nats."""
    return -(probabilities * probabilities.clamp(min=1e-12).log()).sum(dim=-1)
