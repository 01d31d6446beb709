"""What the files of a data set hold: images, masks, and how many pixels each class has."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.progress import track
from torch import Tensor

from serve.contract.errors import ImageError
from serve.images.decode import decode_image
from serve.settings import MEBIBYTE, MEGAPIXEL
from train.data.folder import Split, Tile, TileFolder
from train.errors import FocalPathError

IGNORED = 255
"""A value of masks that means unlabelled, too, as many data sets write it."""
_MAX_MEGAPIXELS = 1000
_MAX_MEBIBYTES = 4096
"""Largest image of a data set: the user's own files are trusted further than an upload."""
_TRANSPOSED = (5, 6, 7, 8)
"""Values of EXIF's orientation that swap width and height."""


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read an image as serving does: (H, W, 3) uint8, RGB in [0, 255], upright, no alpha.

    Raises:
        FocalPathError: the file is missing, damaged, or of a kind that would be read wrongly.
    """
    try:
        return decode_image(
            path.read_bytes(),
            max_bytes=_MAX_MEBIBYTES * MEBIBYTE,
            max_pixels=_MAX_MEGAPIXELS * MEGAPIXEL,
        )
    except (ImageError, OSError) as error:
        raise FocalPathError(
            f"{path} cannot be read as an image: {error} Replace the file or remove it from "
            "folds.csv."
        ) from error


def read_mask(path: Path, num_classes: int) -> NDArray[np.uint8]:
    """Read a mask as (H, W) uint8 in 0..C, upright; `IGNORED` becomes 0.

    Raises:
        FocalPathError: the file is unreadable, not one channel of whole numbers, or has a label
            above C.
    """
    image = _open(path)
    if image.mode not in ("1", "L", "P", "I", "I;16"):
        raise FocalPathError(
            f"{path} has the mode {image.mode}; expected one channel of 8 bits (L or P) with "
            f"0 unlabelled and 1..{num_classes} the classes"
        )
    mask = np.array(image)
    mask[mask == IGNORED] = 0
    if mask.max(initial=0) > num_classes or mask.min(initial=0) < 0:
        raise FocalPathError(
            f"{path} has the label {mask.max()}; dataset.json names {num_classes} classes, so "
            f"expected at most {num_classes}, or {IGNORED} for unlabelled. Correct the mask or "
            "name the class."
        )
    return mask.astype(np.uint8, copy=False)


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image, upright, from its header."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112) in _TRANSPOSED
            width, height = image.size
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise _unreadable(path, error) from error
    return (width, height) if turned else (height, width)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> FocalPathError:
    return FocalPathError(
        f"{path} cannot be read as an image ({error}). Replace the file or remove it from "
        "folds.csv."
    )


def count_pixels(folder: TileFolder, split: Split) -> NDArray[np.int64]:
    """Count labels over a split's masks and check each mask against its image.

    Returns:
        (1 + C,) pixels, unlabelled first.

    Raises:
        FocalPathError: the split is empty, a mask is damaged or of another size than its image.
    """
    return np.asarray(count_each(folder, split).sum(axis=0))


def count_each(folder: TileFolder, split: Split) -> NDArray[np.int64]:
    """Count the labels of each mask of a split; see `count_pixels`.

    Returns:
        (N, 1 + C) pixels, unlabelled first, in the order of the split's images.
    """
    tiles = folder.tiles[split]
    if not tiles:
        raise FocalPathError(
            f"{folder.root / 'folds.csv'} has no {split} tile; expected at least one "
            "(fold -1 is test, 0 validation, any other training)"
        )
    num_classes = len(folder.classes)

    def count(tile: Tile) -> NDArray[np.int64]:
        mask = read_mask(tile.mask, num_classes)
        height, width = image_size(tile.image)
        if (height, width) != mask.shape:
            raise FocalPathError(
                f"{tile.mask} is {mask.shape[1]} x {mask.shape[0]} pixels, its image "
                f"{width} x {height}; expected the same size"
            )
        return np.bincount(mask.ravel(), minlength=1 + num_classes)

    with ThreadPoolExecutor() as pool:
        counts = track(pool.map(count, tiles), f"Counting {split} pixels", total=len(tiles))
        return np.stack(list(counts))


def class_frequencies(folder: TileFolder) -> Tensor:
    """Each class's share of the labelled training area, (C,) float32.

    Where images differ in um per pixel, an area counts as often as the network sees it: a pixel
    at 0.5 um is four at 0.25.

    Raises:
        FocalPathError: a class has no training pixel.
    """
    counts = count_each(folder, "training")[:, 1:]
    pixels = counts.sum(axis=0)
    missing = [entry.name for entry, count in zip(folder.classes, pixels, strict=True) if not count]
    if missing:
        raise FocalPathError(
            f"no training pixel is labelled {', '.join(missing)}; every class needs some. Move "
            "tiles between folds, or remove the class from dataset.json and the masks."
        )
    known = [tile.mpp for tile in folder.tiles["training"]]
    areas = np.array([1.0 if mpp is None else mpp**2 for mpp in known])
    weighed = areas @ counts if len(set(known)) > 1 else pixels
    return torch.tensor(weighed / weighed.sum(), dtype=torch.float32)
