"""What the files of a data set hold, read once before training: labels, and pixels per class.

`train check` and `fit` call `require_trainable`, so that both refuse the same data sets.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from serve.images.decode import TRANSPOSED
from train.data.folder import SPLITS, Split, Tile, TileFolder
from train.data.images import inspect_image
from train.data.mask_files import has_orientation, turn_upright
from train.data.masks import mask_values, read_mask
from train.errors import DatasetError, FocalPathError, MaskError

_MOST_TOLD = 5
"""Damaged files that an error lists."""
_MOST_LOOKED_AT = 100
"""Masks that are read again to advise the user."""


def read_labels(tile: Tile, num_classes: int) -> NDArray[np.uint8]:
    """Read the (H, W) uint8 labels that lie on an image as `read_image` reads it.

    Where the image is turned by its EXIF orientation and the mask's file has none, the mask may lie
    on the stored pixels or on the upright ones. Its size shows which, or dataset.json's
    `mask_orientation` does. It is never guessed.

    Raises:
        MaskError: the mask cannot be read, or its orientation is not known.
    """
    labels = read_mask(tile.mask, num_classes, tile.code)
    facts = inspect_image(tile.image)
    stated = tile.code.orientation if tile.code else None
    if facts.orientation == 1 or stated == "upright" or has_orientation(tile.mask):
        return labels
    turned = turn_upright(labels, facts.orientation)
    if stated == "stored":
        return turned
    if facts.height == facts.width or facts.orientation not in TRANSPOSED:
        raise MaskError(
            f"{tile.image} is turned by its EXIF orientation {facts.orientation}, and its mask "
            'does not say which way is up. Add "mask_orientation" to dataset.json: "stored" if '
            'masks were drawn on the pixels as they are stored, "upright" if on the image as '
            "viewers show it."
        )
    return labels if labels.shape == (facts.height, facts.width) else turned


def require_trainable(
    folder: TileFolder, counts: Mapping[Split, NDArray[np.int64]] | None = None
) -> NDArray[np.int64]:
    """Refuse a data set that training would refuse or stop at. Decodes every mask once.

    `counts` are those of `count_all`, where they are known already.

    Returns:
        The training images' counts, as `count_each` returns them.

    Raises:
        FocalPathError: a file cannot be read, a class has no training pixel, or the validation
            images have no label.
    """
    counts = count_all(folder) if counts is None else counts
    _require_tiles(folder, "training")
    _require_tiles(folder, "validation")
    class_frequencies(folder, counts["training"])
    _require_any(folder, "validation", counts["validation"])
    return counts["training"]


def require_labelled(folder: TileFolder, split: Split) -> None:
    """Refuse a split in which there is nothing to score.

    Raises:
        DatasetError: no pixel of its images is labelled.
    """
    _require_any(folder, split, count_each(folder, split))


def _require_tiles(folder: TileFolder, split: Split) -> None:
    if not folder.tiles[split]:
        raise DatasetError(
            f"{folder.root / 'folds.csv'} has no {split} tile; expected at least one "
            "(fold -1 is test, 0 validation, any other training)"
        )


def _require_any(folder: TileFolder, split: Split, counts: NDArray[np.int64]) -> None:
    if not counts[:, 1:].any():
        raise DatasetError(
            f"no pixel of the {split} tiles of {folder.root} is labelled; scores need some. Move "
            "tiles between folds in folds.csv, or correct the masks."
        )


def count_all(folder: TileFolder) -> dict[Split, NDArray[np.int64]]:
    """Count the labels of each mask of every split that has one; see `count_each`."""
    return {split: count_each(folder, split) for split in SPLITS if folder.tiles[split]}


def count_each(folder: TileFolder, split: Split) -> NDArray[np.int64]:
    """Count the labels of each mask of a split and check each mask against its image.

    Returns:
        (N, 1 + C) pixels, unlabelled first, in the order of the split's images.

    Raises:
        FocalPathError: the split is empty, an image or a mask cannot be read, or their sizes
            differ; it lists the first files.
    """
    _require_tiles(folder, split)
    tiles = folder.tiles[split]
    num_classes = len(folder.classes)

    def count(tile: Tile) -> NDArray[np.int64] | FocalPathError:
        try:
            facts = inspect_image(tile.image)
            mask = read_labels(tile, num_classes)
        except FocalPathError as error:
            return error
        if (facts.height, facts.width) != mask.shape:
            return MaskError(
                f"{tile.mask} is {mask.shape[1]} x {mask.shape[0]} pixels, its image "
                f"{facts.width} x {facts.height}; expected the same size"
            )
        return np.bincount(mask.ravel(), minlength=1 + num_classes)

    with ThreadPoolExecutor() as pool:
        counts = track(pool.map(count, tiles), f"Reading {split} images", total=len(tiles))
        found = list(counts)
    wrong = [error for error in found if isinstance(error, FocalPathError)]
    if wrong:
        raise _all_of(wrong, len(tiles), split)
    return np.stack([pixels for pixels in found if not isinstance(pixels, FocalPathError)])


def _all_of(errors: list[FocalPathError], num_tiles: int, split: Split) -> FocalPathError:
    """One error that lists what is wrong with the files of a split."""
    if len(errors) == 1:
        return errors[0]
    listed = "\n".join(f"  {error}" for error in errors[:_MOST_TOLD])
    more = f"\n  and {len(errors) - _MOST_TOLD} more" if len(errors) > _MOST_TOLD else ""
    return type(errors[0])(
        f"{len(errors)} of {num_tiles} {split} images or masks cannot be used:\n{listed}{more}"
    )


def class_frequencies(folder: TileFolder, counts: NDArray[np.int64] | None = None) -> Tensor:
    """Each class's share of the labelled training area, (C,) float32.

    Where images differ in um per pixel, an area counts as often as the network sees it: a pixel
    at 0.5 um is four at 0.25. `counts` are those of `count_each`, where they are known already.

    Raises:
        DatasetError: a class has no training pixel.
    """
    counts = (count_each(folder, "training") if counts is None else counts)[:, 1:]
    pixels = counts.sum(axis=0)
    missing = [entry.name for entry, count in zip(folder.classes, pixels, strict=True) if not count]
    if missing:
        raise DatasetError(
            f"no training pixel is labelled {', '.join(missing)}; every class needs some. Move "
            "tiles between folds, or remove the class from dataset.json and the masks."
            + _value_advice(folder)
        )
    weighed = pixel_areas(folder, "training") @ counts
    return torch.tensor(weighed / weighed.sum(), dtype=torch.float32)


def pixel_areas(folder: TileFolder, split: Split) -> NDArray[np.float64]:
    """The area of a pixel of each image over the largest one's, (N,); 1 where none is known."""
    areas = np.array([tile.mpp or 1.0 for tile in folder.tiles[split]]) ** 2
    return np.asarray(areas / areas.max())


def _value_advice(folder: TileFolder) -> str:
    """What to write into dataset.json where the masks count from 0, or are 0 and 255."""
    tiles = folder.tiles["training"][:_MOST_LOOKED_AT]
    if not tiles or (tiles[0].code and tiles[0].code.values):
        return ""
    values = set[int]().union(*(mask_values(tile.mask) for tile in tiles))
    names = [entry.name for entry in folder.classes]
    from_zero, two = set(range(len(names))), {0, 255}
    if values not in (from_zero, two if len(names) == 2 else from_zero):
        return ""
    table = ", ".join(
        f'"{value}": "{name}"' for value, name in zip(sorted(values), names, strict=True)
    )
    return (
        f" The masks hold the values {', '.join(map(str, sorted(values)))}, and 0 is unlabelled: "
        f'if it is {names[0]}, add "mask_values": {{{table}}} to dataset.json.'
    )
