"""The samples that a network trains on and is scored on, from images of any size.

Shape legend: H, W: the image on disk; T: tile size; N: tiles of an image.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from serve.images.mpp import Mpp
from serve.images.tiles import pad_by_reflection
from train.data.augmentation import NUM_VIEWS, draw_window, turn, vary_colors
from train.data.folder import Tile
from train.data.images import image_size, read_image
from train.data.order import TileKey, whole_key
from train.data.pixels import read_labels
from train.data.scale import Placement, TileScale, cut_image, cut_labels, nearest
from train.settings import AugmentationSettings

_KEPT_BYTES = 512 * 2**20
"""Decoded images that each loading process keeps in memory (our choice)."""


Features = Callable[[int, int, int], Tensor]
"""Cached features (D, T/16, T/16) of a tile, by the image's index, the tile's number and the view.
They take the place of pixels; the tiles are then those that cover the image."""


class Sample(TypedDict):
    """A tile to train on.

    image: (3, T, T) uint8, RGB in [0, 255], or features: (D, T/16, T/16), where they are cached.
    labels: (T, T) int64, 0..C.
    """

    tile_id: str
    image: NotRequired[Tensor]
    features: NotRequired[Tensor]
    labels: Tensor


class WholeImage(TypedDict):
    """An image to segment and score as a whole.

    tiles: (N, 3, T, T) uint8, RGB in [0, 255]. tile_labels: (N, T, T) uint8, 0..C, at the model's
    um per pixel. labels: (H, W) uint8, 0..C, on the image's own grid. placement: where the tiles
    lie. features: (N, D, T/16, T/16), in the place of the tiles where they are cached.
    """

    tile_id: str
    size: tuple[int, int]
    placement: Placement
    tiles: NotRequired[Tensor]
    features: NotRequired[Tensor]
    labels: NotRequired[Tensor]
    tile_labels: NotRequired[Tensor]


class _Images:
    """Decoded images with their labels; the last ones are kept, up to `_KEPT_BYTES`."""

    def __init__(self, tiles: Sequence[Tile], num_classes: int) -> None:
        self._tiles, self._num_classes = tiles, num_classes
        self._kept: OrderedDict[int, tuple[NDArray[np.uint8], NDArray[np.uint8]]] = OrderedDict()
        self._num_bytes = 0

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """An image's pixels (H, W, 3) and labels (H, W), both uint8."""
        if (found := self._kept.pop(index, None)) is None:
            tile = self._tiles[index]
            found = read_image(tile.image), read_labels(tile, self._num_classes)
            self._num_bytes += sum(part.nbytes for part in found)
        self._kept[index] = found
        while self._num_bytes > _KEPT_BYTES and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._num_bytes -= sum(part.nbytes for part in dropped)
        return found


class TileDataset(Dataset[Sample]):
    """Tiles of the model's size, at its um per pixel, cut from images of any size.

    With augmentation, each tile is cut at random, and an image gives as many per epoch as its
    area holds. Without, or if `fixed`, tiles are those that serving cuts: they cover the image.

    The chance of a tile depends only on (seed, epoch, index, copy): a run that is resumed, or has
    another number of workers, sees the same tiles.
    """

    def __init__(
        self,
        tiles: Sequence[Tile],
        num_classes: int,
        scale: TileScale,
        augmentation: AugmentationSettings | None = None,
        seed: int = 0,
        *,
        fixed: bool = False,
    ) -> None:
        """Look at the images' sizes; pixels are read when a sample is asked for.

        Raises:
            ImageFileError: an image is missing or damaged.
        """
        self.tiles = tiles
        self.scale = scale
        self._seed = seed
        self._augmentation = augmentation or AugmentationSettings(augment="none")
        self._fixed = fixed or scale.squeeze or self._augmentation.augment == "none"
        self._images = _Images(tiles, num_classes)
        self.features: Features | None = None
        self.placements = [scale.place(*image_size(tile.image), tile.pixel_size) for tile in tiles]
        self.items = [
            (index, number)
            for index, placement in enumerate(self.placements)
            for number in range(self._num_tiles(placement))
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: int | TileKey) -> Sample:
        """Load a tile by its index, or by (epoch, index) to draw that epoch's augmentation.

        (epoch, index, copy) draws another one for a tile that the epoch shows again.
        """
        epoch, index, copy = whole_key(key)
        view = self.view(epoch, index, copy)
        image_index, number = self.items[index]
        tile_id = self.tiles[image_index].tile_id
        if self.features is not None:
            labels = self.fixed_labels(image_index)[number]
            features = self.features(image_index, number, view)
            return {"tile_id": tile_id, "features": features, "labels": turn(labels, view).long()}
        image, labels = self._draw(epoch, index, copy)
        return {
            "tile_id": tile_id,
            "image": turn(image, view).contiguous(),
            "labels": turn(labels, view).long(),
        }

    def view(self, epoch: int, index: int, copy: int = 0) -> int:
        """Which flip and turn a tile has in an epoch, in 0..7."""
        if self._augmentation.augment == "none":
            return 0
        return _mix(*self._chance(epoch, index, copy), 1) % NUM_VIEWS

    def fixed_tiles(self, image_index: int) -> Tensor:
        """The (N, 3, T, T) uint8 tiles that cover an image."""
        image, _ = self._images.read(image_index)
        return _tiles(image, self.placements[image_index], self.scale)

    def fixed_labels(self, image_index: int) -> Tensor:
        """The (N, T, T) uint8 labels that belong to `fixed_tiles`."""
        _, labels = self._images.read(image_index)
        return torch.from_numpy(cut_labels(labels, self.placements[image_index], self.scale).copy())

    def _num_tiles(self, placement: Placement) -> int:
        if self._fixed:
            return len(placement.places)
        height, width = placement.size
        return max(1, round(height * width / self.scale.tile_size_px**2))

    def _chance(self, epoch: int, index: int, copy: int) -> tuple[int, ...]:
        """What a tile's random numbers are seeded with."""
        return self._seed, epoch, index, *((2, copy) if copy else ())

    def _draw(self, epoch: int, index: int, copy: int) -> tuple[Tensor, Tensor]:
        """A tile (3, T, T) and its labels (T, T), both uint8."""
        image_index, number = self.items[index]
        if self._fixed:
            return self.fixed_tiles(image_index)[number], self.fixed_labels(image_index)[number]
        full = self._augmentation.augment == "full"
        rng = np.random.default_rng(self._chance(epoch, index, copy))
        image, labels = self._images.read(image_index)
        side = self.scale.tile_size_px
        factor = self.scale.factor(self.tiles[image_index].pixel_size)
        rows, columns = side / factor[0], side / factor[1]
        image, labels = _pad(image, labels, round(rows), round(columns))
        scale_min = self._augmentation.crop_scale_min if full else 1.0
        window = draw_window(rng, labels, (rows, columns), scale_min)
        tile = _resize(image[window], side)
        if full:
            tile = vary_colors(tile, rng, self._augmentation)
        return tile, torch.from_numpy(nearest(labels[window], side, side).copy())


def _pad(
    image: NDArray[np.uint8], labels: NDArray[np.uint8], rows: int, columns: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pad an image to this size at least, as serving does; the padding is unlabelled."""
    rows, columns = max(labels.shape[0], rows), max(labels.shape[1], columns)
    if labels.shape == (rows, columns):
        return image, labels
    padded = np.zeros((rows, columns), np.uint8)
    padded[: labels.shape[0], : labels.shape[1]] = labels
    return pad_by_reflection(image, rows, columns), padded


def _resize(image: NDArray[np.uint8], side: int) -> Tensor:
    """Resample (H, W, 3) uint8 to (3, side, side), with smoothing where it becomes smaller."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if image.shape[:2] == (side, side):
        return pixels.contiguous()
    # The same filter as in serving, but torch's is several times faster than Pillow's.
    resized = torch.nn.functional.interpolate(
        pixels[None], size=(side, side), mode="bicubic", antialias=True
    )
    return resized[0].contiguous()


class WholeImageDataset(Dataset[WholeImage]):
    """Whole images, cut as serving cuts them, with their labels."""

    def __init__(self, tiles: Sequence[Tile], num_classes: int, scale: TileScale) -> None:
        """Look at the images' sizes.

        Raises:
            ImageFileError: an image is missing or damaged.
        """
        self.tiles = tiles
        self.scale = scale
        self._num_classes = num_classes
        self.features: Features | None = None
        self.sizes = [image_size(tile.image) for tile in tiles]
        self.placements = [
            scale.place(*size, tile.pixel_size)
            for size, tile in zip(self.sizes, tiles, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: int) -> WholeImage:
        """Read and cut an image."""
        sample = self.labels(index)
        if self.features is None:
            sample["tiles"] = self.fixed_tiles(index)
        else:
            numbers = range(len(self.placements[index].places))
            sample["features"] = torch.stack([self.features(index, n, 0) for n in numbers])
        return sample

    def fixed_tiles(self, index: int) -> Tensor:
        """The (N, 3, T, T) uint8 tiles of an image."""
        image = read_image(self.tiles[index].image)
        return _tiles(image, self.placements[index], self.scale)

    def labels(self, index: int) -> WholeImage:
        """An image's labels and placement, without its pixels."""
        tile = self.tiles[index]
        mask = read_labels(tile, self._num_classes)
        tile_labels = cut_labels(mask, self.placements[index], self.scale)
        return {
            "tile_id": tile.tile_id,
            "size": self.sizes[index],
            "placement": self.placements[index],
            "labels": torch.from_numpy(mask.copy()),
            "tile_labels": torch.from_numpy(tile_labels.copy()),
        }


def see_image(
    name: str, pixels: NDArray[np.uint8], mpp: Mpp | None, scale: TileScale
) -> WholeImage:
    """Cut an image without labels, (H, W, 3) uint8, as a model sees it."""
    height, width = pixels.shape[:2]
    placement = scale.place(height, width, mpp)
    return {
        "tile_id": name,
        "size": (height, width),
        "placement": placement,
        "tiles": _tiles(pixels, placement, scale),
    }


def _tiles(image: NDArray[np.uint8], placement: Placement, scale: TileScale) -> Tensor:
    """Cut an (H, W, 3) uint8 image into tiles (N, 3, T, T) uint8."""
    return torch.from_numpy(cut_image(image, placement, scale).transpose(0, 3, 1, 2).copy())


def _mix(*values: int) -> int:
    return int(np.random.SeedSequence(values).generate_state(1, np.uint64)[0] >> np.uint64(1))
