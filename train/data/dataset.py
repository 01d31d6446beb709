"""The samples that a network sees, cut and varied from images of any size."""

from collections.abc import Iterator, Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from train.data.folder import Split, Tile, TileFolder
from train.data.pixels import read_image, read_mask
from train.settings import AugmentationSettings, Settings


class Sample(TypedDict):
    """A tile for the model.

    image: (3, H, W) uint8. labels: (H, W) int64, 0..C.
    """

    tile_id: str
    image: Tensor
    labels: Tensor


NUM_VIEWS = 8
"""Flips and quarter turns of a square."""


def turn(pixels: Tensor, view: int) -> Tensor:
    """Flip and turn (..., H, W) by a view in 0..7; view 0 leaves it as it is."""
    flipped = pixels.flip(-1) if view >= 4 else pixels
    return torch.rot90(flipped, view % 4, dims=(-2, -1))


class TileDataset(Dataset[Sample]):
    """Tiles at the model's size, augmented when asked.

    The augmentation of a tile depends only on (seed, epoch, index): a run that is resumed, or has
    another number of workers, sees the same tiles.
    """

    def __init__(
        self,
        tiles: Sequence[Tile],
        num_classes: int,
        tile_size_px: int,
        augmentation: AugmentationSettings | None = None,
        seed: int = 0,
        label_size_px: int | None = None,
    ) -> None:
        """Read tiles as (T, T) images, with labels of the same size.

        Without an augmentation labels may be of another size, `label_size_px`.
        """
        assert label_size_px is None or augmentation is None
        self.tiles = tiles
        self.num_classes = num_classes
        self._seed = seed
        self._augment = "none" if augmentation is None else augmentation.augment
        size = (tile_size_px, tile_size_px)
        self._resize = v2.Resize(size, antialias=True)
        self._resize_labels = v2.Resize((label_size_px or tile_size_px,) * 2)
        self._distort: v2.Transform | None = None
        if augmentation is not None and augmentation.augment == "full":
            jitter = augmentation.color_jitter
            scale = (augmentation.crop_scale_min, 1.0)
            self._distort = v2.Compose(
                [
                    v2.RandomResizedCrop(size, scale=scale, antialias=True),
                    v2.ColorJitter(jitter, jitter, jitter, jitter),
                ]
            )

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """Load a tile by its index, or by (epoch, index) to draw that epoch's augmentation."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, labels = self._read(index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_mix(self._seed, epoch, index))
            image, labels = self._vary(image, labels)
        view = self.view(epoch, index)
        return {
            "tile_id": self.tiles[index].tile_id,
            "image": turn(image.as_subclass(Tensor), view).contiguous(),
            "labels": turn(labels.as_subclass(Tensor), view).long(),
        }

    def view(self, epoch: int, index: int) -> int:
        """Which flip and turn a tile has in an epoch, in 0..7."""
        if self._augment == "none":
            return 0
        return _mix(self._seed, epoch, index, 1) % NUM_VIEWS

    def plain_image(self, index: int, view: int) -> Tensor:
        """A tile's image (3, H, W) uint8 at the model's size, only flipped and turned."""
        image, _ = self._resize(*self._read(index))
        return turn(image.as_subclass(Tensor), view).contiguous()

    def plain_labels(self, index: int, view: int) -> Tensor:
        """The labels (H, W) int64 that belong to `plain_image`."""
        _, labels = self._read(index)
        return turn(self._resize_labels(labels).as_subclass(Tensor), view).long()

    def _vary(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self._distort is None:
            return self._resize(image), self._resize_labels(labels)
        varied: tuple[Tensor, Tensor] = self._distort(image, labels)
        return varied

    def _read(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        tile = self.tiles[index]
        pixels = torch.from_numpy(read_image(tile.image).copy()).permute(2, 0, 1)
        labels = torch.from_numpy(read_mask(tile.mask, self.num_classes).copy())
        return tv_tensors.Image(pixels), tv_tensors.Mask(labels)


def evaluation_tiles(folder: TileFolder, split: Split, settings: Settings) -> TileDataset:
    """A split's tiles as they are scored: not augmented, labels at the size that counts."""
    model = settings.model
    return TileDataset(
        folder.tiles[split],
        len(folder.classes),
        model.tile_size_px,
        label_size_px=model.score_size_px,
    )


class EpochSampler(Sampler[tuple[int, int]]):
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

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_tiles)
        mine = order[self.rank :: self.num_ranks][: len(self)]
        return iter([(self.epoch, int(index)) for index in mine])


def _mix(*values: int) -> int:
    return int(np.random.SeedSequence(values).generate_state(1, np.uint64)[0] >> np.uint64(1))
