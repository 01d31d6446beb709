"""The order of images in an epoch, and each process's share of them."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from train.data.scale import Placement


def pack_images(
    placements: Sequence[Placement], num_tiles: int, *, rank: int = 0, num_ranks: int = 1
) -> list[list[int]]:
    """Group images, in order, so that a group has about `num_tiles` tiles, and one image at least.

    Each rank gets its share of the images.
    """
    packs: list[list[int]] = []
    room = 0
    for index in range(rank, len(placements), num_ranks):
        needed = len(placements[index].places)
        if not packs or needed > room:
            packs.append([])
            room = num_tiles
        packs[-1].append(index)
        room -= needed
    return packs


TileKey = tuple[int, ...]
"""(epoch, index), or (epoch, index, copy): copy counts how often the epoch had the tile before."""


def whole_key(key: int | TileKey) -> tuple[int, int, int]:
    """Epoch, index and copy of a key, or of an index alone; 0 where they are not given."""
    epoch, index, *copy = (0, key) if isinstance(key, int) else key
    return epoch, index, copy[0] if copy else 0


class EpochSampler(Sampler[TileKey]):
    """Shuffled (epoch, index) keys, the same for the same seed; each rank gets its share."""

    def __init__(
        self, num_tiles: int, seed: int, *, rank: int = 0, num_ranks: int = 1, epoch: int = 0
    ) -> None:
        self.num_tiles, self.seed = num_tiles, seed
        self.rank, self.num_ranks = rank, num_ranks
        self.epoch = epoch

    def set_epoch(self, epoch: int) -> None:
        """Lightning tells the epoch before it begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_tiles // self.num_ranks

    def __iter__(self) -> Iterator[TileKey]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_tiles)
        mine = order[self.rank :: self.num_ranks][: len(self)]
        return iter([(self.epoch, int(index)) for index in mine])
