"""Which tiles an epoch shows, in which order, and each process's share of them."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
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


class BalancedSampler(EpochSampler):
    """Draws tiles with replacement, by weight (our choice); each rank gets its share of the draw.

    Keys are (epoch, index, copy): a tile that is drawn again is augmented in another way.
    """

    def __init__(
        self,
        weights: NDArray[np.float64],
        seed: int,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        epoch: int = 0,
    ) -> None:
        """Draw by `weights` (N,), which are 0 or more, and not all 0."""
        super().__init__(len(weights), seed, rank=rank, num_ranks=num_ranks, epoch=epoch)
        self._chances = weights / weights.sum()

    def __iter__(self) -> Iterator[TileKey]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.choice(self.num_tiles, self.num_tiles, p=self._chances)
        drawn: Counter[int] = Counter()
        keys = []
        for index in order.tolist():
            keys.append((self.epoch, index, drawn[index]))
            drawn[index] += 1
        return iter(keys[self.rank :: self.num_ranks][: len(self)])


def balanced_weights(
    counts: NDArray[np.int64], areas: NDArray[np.float64], image_of_tile: Sequence[int]
) -> NDArray[np.float64]:
    """Compute the weight of each tile, so that all classes are drawn equally often.

    A class is chosen with equal chances among those that are present, then an image by its share of
    the class's area, then one of its tiles.

    Args:
        counts: (I, 1 + C) pixels of each image, unlabelled first.
        areas: (I,) area of a pixel of each image, in any unit.
        image_of_tile: The image that each of the N tiles is cut from.

    Returns:
        (N,) weights; their sum is the number of classes that are there.
    """
    found = counts[:, 1:] * areas[:, None]
    present = found.any(axis=0)
    of_image = (found[:, present] / found[:, present].sum(axis=0)).sum(axis=1)
    num_tiles = np.bincount(image_of_tile, minlength=len(counts))
    images = np.asarray(image_of_tile)
    return np.asarray(of_image[images] / num_tiles[images])
