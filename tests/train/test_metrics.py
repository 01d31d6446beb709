import pytest
import torch
from torchmetrics.classification import MulticlassF1Score, MulticlassJaccardIndex

from train.metrics import PooledConfusion, class_scores

NUM_CLASSES = 4


@pytest.fixture
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    shape = (2, 16, 16)
    return [
        (torch.randint(1, NUM_CLASSES + 1, shape), torch.randint(0, NUM_CLASSES + 1, shape))
        for _ in range(3)
    ]


def test_scores_equal_torchmetrics_f1_and_jaccard_over_all_pixels(
    batches: list[tuple[torch.Tensor, torch.Tensor]],
):
    confusion = PooledConfusion(NUM_CLASSES)
    f1 = MulticlassF1Score(NUM_CLASSES, average=None, ignore_index=-1)
    jaccard = MulticlassJaccardIndex(NUM_CLASSES, average=None, ignore_index=-1)
    for predicted, target in batches:
        confusion.update(predicted, target)
        f1.update(predicted - 1, target - 1)
        jaccard.update(predicted - 1, target - 1)
    scores = class_scores(confusion.compute())
    torch.testing.assert_close(scores.dice, f1.compute())
    torch.testing.assert_close(scores.iou, jaccard.compute())


def test_unlabelled_pixels_are_ignored():
    confusion = PooledConfusion(NUM_CLASSES)
    confusion.update(torch.tensor([[[1, 2, 3]]]), torch.tensor([[[1, 2, 0]]]))
    assert confusion.compute().sum() == 2


def test_a_class_that_is_absent_and_not_predicted_leaves_the_mean():
    confusion = PooledConfusion(NUM_CLASSES)
    confusion.update(torch.tensor([[[1, 2]]]), torch.tensor([[[1, 2]]]))
    scores = class_scores(confusion.compute())
    assert scores.dice.isnan().tolist() == [False, False, True, True]
    assert scores.mean_dice == 1.0


def test_a_class_that_is_absent_and_predicted_is_no_part_of_either_mean():
    confusion = PooledConfusion(NUM_CLASSES)
    confusion.update(torch.tensor([[[1, 1, 2, 3]]]), torch.tensor([[[1, 2, 2, 2]]]))
    scores = class_scores(confusion.compute())
    assert scores.iou.isnan().tolist() == scores.dice.isnan().tolist() == [False, False, True, True]
    assert scores.mean_dice == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores.mean_iou == pytest.approx((1 / 2 + 1 / 3) / 2)
