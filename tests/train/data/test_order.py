import numpy as np
import pytest

from train.data.order import BalancedSampler, EpochSampler, balanced_weights

# Three images: the second class is in the last one alone, the third nowhere.
COUNTS = np.array([[50, 1000, 0, 0], [0, 3000, 0, 0], [7, 0, 10, 0]])


def test_sampler_shuffles_every_epoch_and_shares_tiles_between_ranks():
    one, two = (EpochSampler(10, seed=0, rank=rank, num_ranks=2) for rank in range(2))
    first = [*one, *two]
    assert sorted(index for _, index in first) == list(range(10))
    one.set_epoch(1)
    assert [index for _, index in one] != [index for _, index in first[:5]]
    assert {epoch for epoch, _ in one} == {1}


def test_every_class_is_looked_for_as_often_whatever_its_share():
    weights = balanced_weights(COUNTS, np.ones(3), [0, 1, 1, 2])
    assert weights.tolist() == pytest.approx([0.25, 0.375, 0.375, 1.0])


def test_an_image_counts_by_its_area_and_not_by_the_fineness_of_its_pixels():
    finer = COUNTS * np.array([[1], [16], [1]])  # the same tissue at a quarter of the um per pixel
    weights = balanced_weights(finer, np.array([1, 1 / 16, 1]), [0, 1, 1, 2])
    assert weights.tolist() == pytest.approx([0.25, 0.375, 0.375, 1.0])


def test_an_epoch_is_the_same_for_its_seed_and_ranks_share_it():
    weights = balanced_weights(COUNTS, np.ones(3), [0, 1, 2])
    whole = list(BalancedSampler(weights, seed=3, epoch=2))
    parts = [list(BalancedSampler(weights, seed=3, rank=r, num_ranks=3, epoch=2)) for r in range(3)]
    assert [part[0] for part in parts] == whole
    assert all(epoch == 2 for epoch, *_ in whole)
    other = BalancedSampler(weights, seed=3)
    epochs = set()
    for epoch in range(5):
        other.set_epoch(epoch)
        epochs.add(tuple(index for _, index, _ in other))
    assert len(epochs) > 1


def test_a_tile_that_an_epoch_shows_again_is_numbered_over_all_ranks():
    weights = np.array([0.9, 0.1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    ranks = [list(BalancedSampler(weights, seed=0, rank=r, num_ranks=2)) for r in range(2)]
    keys = [key for pair in zip(*ranks, strict=True) for key in pair]  # in the order of the draws
    for index in (0, 1):
        copies = [copy for _, drawn, copy in keys if drawn == index]
        assert copies == list(range(len(copies)))
    assert len({*keys}) == len(keys) == 12


def test_tiles_are_drawn_by_their_weight():
    weights = np.repeat([3.0, 1.0, 0.0], 1000)
    drawn = np.array([index for _, index, _ in BalancedSampler(weights, seed=0)]) // 1000
    shares = np.bincount(drawn, minlength=3) / len(drawn)
    assert shares.tolist() == pytest.approx([0.75, 0.25, 0.0], abs=0.03)
