"""Tiles on disk in SAM-Path's layout, checked before training, and their augmentation.

ROOT/img/ID.{png,jpg}   RGB tiles
ROOT/mask/ID.png        uint8: 0 unlabelled, 1..C the classes
ROOT/folds.csv          columns img_id,fold: -1 test, 0 validation, others training
ROOT/dataset.json       class names and colours, um per pixel
"""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from train.errors import FocalPathError
from train.settings import MAX_CLASSES, AugmentationSettings, Settings, TissueClass

Split = Literal["training", "validation", "test"]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Tile:
    """An image and its mask on disk."""

    tile_id: str
    image: Path
    mask: Path


class Sample(TypedDict):
    """A tile for the model.

    image: (3, H, W) uint8. labels: (H, W) int64, 0..C.
    """

    tile_id: str
    image: Tensor
    labels: Tensor


@dataclass(frozen=True)
class TileFolder:
    """A data set in SAM-Path's layout, its tiles sorted into splits."""

    root: Path
    classes: tuple[TissueClass, ...]
    mpp: float | None
    tiles: dict[Split, tuple[Tile, ...]]


def read_tile_folder(root: Path) -> TileFolder:
    """Read and check the layout; pixels are not read.

    Raises:
        FocalPathError: a file or a column is missing, or a class is named twice.
    """
    description = root / "dataset.json"
    if not description.is_file():
        raise FocalPathError(
            f"no data set at {root}: {description.name} is missing. Expected the layout img/, "
            'mask/, folds.csv and dataset.json: {"mpp": 0.25, "classes": [{"name": "Tumor", '
            '"color": "#d62728"}, ...]}'
        )
    classes, mpp = _read_description(description)
    tiles: dict[Split, list[Tile]] = {"training": [], "validation": [], "test": []}
    splits: dict[int, Split] = {-1: "test", 0: "validation"}
    for tile_id, fold in _read_folds(root / "folds.csv"):
        tiles[splits.get(fold, "training")].append(_find_tile(root, tile_id))
    return TileFolder(root, classes, mpp, {split: tuple(found) for split, found in tiles.items()})


def _read_description(path: Path) -> tuple[tuple[TissueClass, ...], float | None]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        classes = tuple(TissueClass(**entry) for entry in content["classes"])
        mpp = None if content.get("mpp") is None else float(content["mpp"])
    except (ValueError, KeyError, TypeError) as error:
        raise FocalPathError(
            f"{path} is not readable ({error}); expected "
            '{"mpp": 0.25, "classes": [{"name": "Tumor", "color": "#d62728"}, ...]}'
        ) from error
    names = [str(entry.name) for entry in classes]
    if not 2 <= len(names) <= MAX_CLASSES or len(set(names)) < len(names):
        raise FocalPathError(
            f"{path} names {len(names)} classes ({len(set(names))} different); expected 2 to "
            f"{MAX_CLASSES}, each with its own name"
        )
    for entry in classes:
        if not isinstance(entry.name, str) or entry.name in ("", "mean"):
            raise FocalPathError(
                f"{path} names a class {entry.name!r}; expected text, and not 'mean', which "
                "is the score over all classes"
            )
        if not re.fullmatch(r"#[0-9a-fA-F]{6}", str(entry.color)):
            raise FocalPathError(
                f"{path} gives {entry.name} the colour {entry.color!r}; expected #rrggbb"
            )
    if mpp is not None and mpp <= 0:
        raise FocalPathError(f"{path} has mpp {mpp}; expected um per pixel above 0, or null")
    return classes, mpp


def _read_folds(path: Path) -> Iterator[tuple[str, int]]:
    if not path.is_file():
        raise FocalPathError(f"{path} is missing; expected a CSV with columns img_id,fold")
    try:
        reader = csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines())
    except UnicodeDecodeError as error:
        raise FocalPathError(
            f'{path} is not UTF-8 ({error}). Save it as such, in a spreadsheet as "CSV UTF-8".'
        ) from error
    if not {"img_id", "fold"} <= set(reader.fieldnames or ()):
        raise FocalPathError(
            f"{path} has the columns {reader.fieldnames}; expected img_id and fold"
        )
    for row in reader:
        try:
            yield row["img_id"], int(row["fold"])
        except (TypeError, ValueError) as error:
            raise FocalPathError(
                f"{path}, line {reader.line_num}: fold is {row['fold']!r}; expected a whole "
                "number: -1 test, 0 validation, others training"
            ) from error


def _find_tile(root: Path, tile_id: str) -> Tile:
    candidates = [root / "img" / f"{tile_id}{suffix}" for suffix in IMAGE_SUFFIXES]
    image = next((path for path in candidates if path.is_file()), None)
    if image is None:
        raise FocalPathError(
            f"folds.csv names {tile_id!r}, but {candidates[0]} (or .jpg, .jpeg) does not exist. "
            "Add the image or remove the line."
        )
    mask = root / "mask" / f"{tile_id}.png"
    if not mask.is_file():
        raise FocalPathError(
            f"folds.csv names {tile_id!r}, but {mask} does not exist. "
            "Add the mask or remove the line."
        )
    return Tile(tile_id, image, mask)


def read_image(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read an image as (H, W, 3) uint8, RGB in [0, 255]."""
    return np.asarray(_open(path).convert("RGB"))


def read_mask(path: Path, num_classes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read a mask as (H, W) uint8 in 0..C.

    Raises:
        FocalPathError: the file is unreadable, not one channel of 8 bits, or has a label above C.
    """
    image = _open(path)
    if image.mode not in ("L", "P"):
        raise FocalPathError(
            f"{path} has the mode {image.mode}; expected one channel of 8 bits (L or P) with "
            f"0 unlabelled and 1..{num_classes} the classes"
        )
    mask = np.asarray(image)
    if mask.max(initial=0) > num_classes:
        raise FocalPathError(
            f"{path} has the label {mask.max()}; dataset.json names {num_classes} classes, so "
            f"expected at most {num_classes}. Correct the mask or name the class."
        )
    return mask


def _open(path: Path, *, decode: bool = True) -> Image.Image:
    """Open an image, closed again; without `decode` only its header is read."""
    try:
        with Image.open(path) as image:
            if decode:
                image.load()
            return image
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise FocalPathError(
            f"{path} cannot be read as an image ({error}). Replace the file or remove it from "
            "folds.csv."
        ) from error


def count_pixels(folder: TileFolder, split: Split) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Count labels over a split's masks and check each mask against its image.

    Returns:
        (1 + C,) pixels, unlabelled first.

    Raises:
        FocalPathError: the split is empty, a mask is damaged or of another size than its image.
    """
    tiles = folder.tiles[split]
    if not tiles:
        raise FocalPathError(
            f"{folder.root / 'folds.csv'} has no {split} tile; expected at least one "
            "(fold -1 is test, 0 validation, any other training)"
        )
    num_classes = len(folder.classes)

    def count(tile: Tile) -> np.ndarray[Any, np.dtype[np.int64]]:
        mask = read_mask(tile.mask, num_classes)
        size = _open(tile.image, decode=False).size
        if size != mask.shape[::-1]:
            raise FocalPathError(
                f"{tile.mask} is {mask.shape[1]} x {mask.shape[0]} pixels, its image "
                f"{size[0]} x {size[1]}; expected the same size"
            )
        return np.bincount(mask.ravel(), minlength=1 + num_classes)

    with ThreadPoolExecutor() as pool:
        counts = track(pool.map(count, tiles), f"Counting {split} pixels", total=len(tiles))
        total: np.ndarray[Any, np.dtype[np.int64]] = np.sum(list(counts), axis=0)
        return total


def class_frequencies(folder: TileFolder) -> Tensor:
    """Each class's share of the labelled training pixels, (C,) float32.

    Raises:
        FocalPathError: a class has no training pixel.
    """
    counts = count_pixels(folder, "training")[1:]
    missing = [entry.name for entry, count in zip(folder.classes, counts, strict=True) if not count]
    if missing:
        raise FocalPathError(
            f"no training pixel is labelled {', '.join(missing)}; every class needs some. Move "
            "tiles between folds, or remove the class from dataset.json and the masks."
        )
    return torch.tensor(counts / counts.sum(), dtype=torch.float32)


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
