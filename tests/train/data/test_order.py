from train.data.order import EpochSampler


def test_sampler_shuffles_every_epoch_and_shares_tiles_between_ranks():
    one, two = (EpochSampler(10, seed=0, rank=rank, num_ranks=2) for rank in range(2))
    first = [*one, *two]
    assert sorted(index for _, index in first) == list(range(10))
    one.set_epoch(1)
    assert [index for _, index in one] != [index for _, index in first[:5]]
    assert {epoch for epoch, _ in one} == {1}
