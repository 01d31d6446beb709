import pytest
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss

from train.pretraining.losses import (
    Centers,
    alignment_loss,
    context_loss,
    cross_entropy,
    draw_masks,
    ibot_loss,
    koleo_loss,
    pooled_at,
    spread_loss,
)

B, K, D = 5, 16, 8
STUDENT, TEACHER = 0.1, 0.05


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_context_loss_equals_lightlys_dino_loss_and_moves_the_same_centre() -> None:
    teacher = [_random(B, K, seed=i) for i in range(2)]
    student = [*(_random(B, K, seed=10 + i) for i in range(2)), _random(B, K, seed=12)]
    oracle = DINOLoss(output_dim=K, student_temp=STUDENT, center_momentum=0.9)
    centers = Centers(1, K, 0.9)
    scales = torch.zeros(B, dtype=torch.long)
    for _ in range(2):  # the second time with a centre that has moved
        targets = [centers.probabilities(logits, scales, TEACHER) for logits in teacher]
        found = context_loss(targets, student, STUDENT)
        expected = oracle(teacher, student, teacher_temp=TEACHER)
        assert found.item() == pytest.approx(expected.item(), abs=1e-6)
        for logits in teacher:
            centers.take(logits, scales)
        centers.move()
        assert torch.allclose(centers.center[0], oracle.center.flatten(), atol=1e-6)


def test_the_ibot_loss_equals_lightlys() -> None:
    teacher, student = _random(B, 9, K, seed=1), _random(B, 9, K, seed=2)
    mask = _random(B, 9, seed=3) > 0.3
    mask[1] = False
    targets = torch.softmax(teacher / TEACHER, dim=-1)
    oracle = IBOTPatchLoss(output_dim=K, student_temp=STUDENT)
    expected = oracle(teacher[mask], student[mask], mask.reshape(B, 3, 3), teacher_temp=TEACHER)
    found = ibot_loss(targets, student, mask, STUDENT)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def test_masks_hide_10_to_50_percent_of_half_of_the_images() -> None:
    torch.manual_seed(0)
    mask = draw_masks(torch.zeros(4000, 100, 1))
    shares = mask.float().mean(dim=1)
    masked = shares[shares > 0]
    assert len(masked) / len(shares) == pytest.approx(0.5, abs=0.03)
    assert 0.1 <= masked.min() <= 0.12
    assert 0.49 <= masked.max() <= 0.51
    assert masked.mean().item() == pytest.approx(0.305, abs=0.01)  # the last patch is whole
    assert mask.float().mean(dim=0).std() < 0.01  # no patch is hidden more often


def test_the_spread_equals_lightlys_koleo_loss() -> None:
    features = _random(B, D, seed=4)
    assert koleo_loss(features).item() == pytest.approx(KoLeoLoss()(features).item(), abs=1e-6)


def test_spread_points_cost_less_than_equal_points() -> None:
    assert koleo_loss(torch.eye(4)) < koleo_loss(torch.ones(4, 4) + 1e-3 * _random(4, 4))


def test_the_spread_knows_no_neighbour_of_another_scale_or_view() -> None:
    coarse, other = _random(6, D, seed=7), _random(6, D, seed=8)
    fine, scales = _random(6, D, seed=9), torch.tensor([0, 1, 0, 1, 1, 2])
    by_hand = [
        koleo_loss(view[torch.tensor(rows)])
        for view in (coarse, other)
        for rows in ([0, 2], [1, 3, 4])
    ]  # scale 2 has one view: nothing to be apart from
    expected = torch.stack([koleo_loss(fine), *by_hand]).mean()
    assert spread_loss([coarse, other], [fine], scales).item() == pytest.approx(expected.item())


def test_a_view_never_teaches_itself() -> None:
    """Two teachers, three student views: four terms, by hand."""
    targets = [torch.softmax(_random(1, K, seed=i), -1) for i in range(2)]
    logits = [_random(1, K, seed=20 + i) for i in range(3)]
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2)]
    by_hand = sum(cross_entropy(targets[t], logits[s], STUDENT).item() for t, s in pairs) / 4
    assert context_loss(targets, logits, STUDENT).item() == pytest.approx(by_hand, abs=1e-6)


def test_each_scale_has_its_own_centre() -> None:
    centers = Centers(2, K, 0.5)
    logits = torch.cat([torch.ones(3, K), 5 * torch.ones(2, K)])
    centers.take(logits, torch.tensor([0, 0, 0, 1, 1]))
    centers.move()
    assert centers.center[:, 0].tolist() == pytest.approx([0.5, 2.5])
    centers.take(torch.ones(1, K), torch.tensor([0]))
    centers.move()
    centers.move()  # nothing was taken: they stay
    assert centers.center[:, 0].tolist() == pytest.approx([0.75, 2.5])


def test_pooling_takes_the_tokens_under_the_footprint() -> None:
    tokens = _random(1, 4, D, seed=5)
    weights = torch.tensor([[[[0.25, 0.0], [0.75, 0.0]]]])
    expected = 0.25 * tokens[0, 0] + 0.75 * tokens[0, 2]
    assert torch.allclose(pooled_at(tokens, weights)[0, 0], expected, atol=1e-6)


def test_alignment_is_least_where_places_and_details_agree() -> None:
    logits = 10 * _random(2, 3, K, seed=6)
    targets = torch.softmax(logits / STUDENT, -1)
    other = logits.roll(1, dims=-1)

    def loss(detail: torch.Tensor) -> float:
        return alignment_loss(
            place_targets=targets[None],
            detail_logits=detail,
            detail_targets=targets,
            place_logits=logits[None],
            temperature=STUDENT,
        ).item()

    assert loss(logits) < loss(other)
