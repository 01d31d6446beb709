"""Which training tiles an epoch shows: class-balanced sampling (our choice)."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from train.data.order import EpochSampler, TileKey


class BalancedSampler(EpochSampler):
    """Draws tiles with replacement, by weight; each rank gets its share of the same draw.

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
