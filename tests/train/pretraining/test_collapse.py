"""The signs of a collapse, by hand."""

import math

import pytest
import torch

from train.pretraining.collapse import effective_rank, signs_of_collapse


def test_entropies_tell_a_used_prototype_from_a_flat_answer() -> None:
    apart = torch.eye(4).reshape(2, 2, 4)  # sharp answers, all prototypes used
    same = torch.eye(4)[[0, 0, 0, 0]].reshape(2, 2, 4)
    flat = torch.full((2, 2, 4), 0.25)
    for targets, of_mean, mean in ((apart, 1, 0), (same, 0, 0), (flat, 1, 1)):
        found = signs_of_collapse(targets, torch.zeros(2, 2, 4), 0.1)
        assert found["entropy_of_mean"].item() == pytest.approx(of_mean, abs=1e-5)
        assert found["mean_entropy"].item() == pytest.approx(mean, abs=1e-5)
        by_hand = (1 - mean) * math.log(4)  # to a student that says nothing
        assert found["teacher_student_kl"].item() == pytest.approx(by_hand, abs=1e-5)


def test_the_rank_counts_directions_by_their_strength() -> None:
    assert effective_rank(torch.eye(5)).item() == pytest.approx(5, rel=1e-4)
    assert effective_rank(torch.ones(6, 3)).item() == pytest.approx(1, rel=1e-3)
    shares = torch.tensor([0.7, 0.2, 0.1])
    by_hand = math.exp(-sum(p * math.log(p) for p in shares.tolist()))
    assert effective_rank(torch.diag(3 * shares)).item() == pytest.approx(by_hand, rel=1e-4)
