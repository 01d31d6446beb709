"""From an image of any size and um per pixel to the tiles that a model sees.

Nothing is squeezed: an image is resampled to the model's um per pixel, with smoothing where it
becomes smaller, then padded by reflection to a tile at least, and cut into overlapping tiles, all
as in serving (`serve.images.tiles`). Pixels of the padding are unlabelled.

Shape legend: H, W: the image on disk; T: tile size; N: tiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.contract.errors import ImageTooLargeError
from serve.images.mpp import Mpp
from serve.images.tiles import (
    UNSCALED,
    Scale,
    check_enlargement,
    pad_by_reflection,
    padded_size,
    resample,
    scale_to,
    scaled_size,
    tile_places,
)
from train.data.folder import Tile
from train.errors import ScaleError


@dataclass(frozen=True, kw_only=True)
class TileScale:
    """The scale at which a model sees tissue."""

    tile_size_px: int
    """Side of the square that it takes."""
    mpp: float | None
    """um per pixel of that square; None: images are taken as they are."""
    squeeze: bool = False
    """Resize every image to one tile, whatever its size, as earlier versions did."""

    def factor(self, image_mpp: Mpp | None) -> Scale:
        """Pixels of the model for one of the image, along (y, x)."""
        return scale_to(self.mpp, image_mpp)

    def place(self, height: int, width: int, image_mpp: Mpp | None) -> "Placement":
        """Where the tiles of an image of that size lie."""
        side = self.tile_size_px
        if self.squeeze:
            return Placement((side, side), (side, side), ((0, 0),), (height, width) == (side, side))
        factor = self.factor(image_mpp)
        size = scaled_size(height, width, factor)
        padded = padded_size(*size, side)
        places = tuple(tile_places(*padded, side))
        return Placement(size, padded, places, len(places) == 1 and factor == UNSCALED)


@dataclass(frozen=True)
class Placement:
    """Where the tiles of an image lie, in pixels at the model's um per pixel."""

    size: tuple[int, int]
    """Rows and columns of the image."""
    padded: tuple[int, int]
    """The same once padded."""
    places: tuple[tuple[int, int], ...]
    """(y, x) of each tile."""
    own_pixels: bool
    """The image is one tile and not resampled: the model's own labels are the answer."""


def cut_image(
    image: NDArray[np.uint8], placement: Placement, scale: TileScale
) -> NDArray[np.uint8]:
    """Cut an (H, W, 3) uint8 image into (N, T, T, 3) uint8 tiles."""
    side = scale.tile_size_px
    if scale.squeeze:
        squeezed = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)
        return np.asarray(squeezed)[None]
    padded = pad_by_reflection(resample(image, *placement.size), *placement.padded)
    return np.stack([padded[y : y + side, x : x + side] for y, x in placement.places])


def seen_at(image: NDArray[np.uint8], image_mpp: Mpp, mpp: float) -> NDArray[np.uint8]:
    """An (H, W, 3) uint8 image as a source of another um per pixel would have it.

    A coarser source lacks detail. A finer one would have more, which no resampling can add: the
    image is then only enlarged.
    """
    height, width = image.shape[:2]
    return resample(image, *scaled_size(height, width, scale_to(mpp, image_mpp)))


def cut_labels(
    labels: NDArray[np.uint8], placement: Placement, scale: TileScale
) -> NDArray[np.uint8]:
    """Cut (H, W) uint8 labels into (N, T, T): each from the nearest pixel, 0 in the padding."""
    side = scale.tile_size_px
    padded = np.zeros(placement.padded, np.uint8)
    rows, columns = placement.size
    padded[:rows, :columns] = nearest(labels, rows, columns)
    return np.stack([padded[y : y + side, x : x + side] for y, x in placement.places])


def nearest(labels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Resample (H, W) labels to (height, width), each from the pixel that holds its centre."""
    if labels.shape == (height, width):
        return labels
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.intp)
        for new, old in zip((height, width), labels.shape, strict=True)
    )
    return np.asarray(labels[rows[:, None], columns])


def refuse_enlarging(mpp: float | None, image_mpp: Mpp | None, what: str) -> None:
    """Raise ScaleError for an image that serving would refuse as too coarse for the model."""
    try:
        check_enlargement(mpp, image_mpp, what)
    except ImageTooLargeError as error:
        raise ScaleError(str(error)) from error


def resolve_mpp(wanted: float | None, default: float | None, tiles: Sequence[Tile]) -> float | None:
    """The um per pixel that a model is trained at.

    Args:
        wanted: What the settings say.
        default: The data set's.
        tiles: The images that it will see.

    Raises:
        ScaleError: the um per pixel of some images are not known, and the model's or other images'
            are; or an image is too coarse for the model.
    """
    mpp = wanted or default
    for tile in tiles:
        refuse_enlarging(mpp, tile.pixel_size, f"{tile.image}")
    unknown = [tile.tile_id for tile in tiles if tile.mpp is None]
    known = [tile.mpp for tile in tiles if tile.mpp is not None]
    if not unknown:
        if mpp is None:
            raise ScaleError(
                "dataset.json has no mpp, and the images are of several, "
                f"{min(known):.4g} to {max(known):.4g} um per pixel; expected one for the "
                "model. Give it as --mpp, or as mpp in dataset.json."
            )
        return mpp
    if mpp is not None or len(unknown) < len(tiles):
        raise ScaleError(
            f"the um per pixel of {len(unknown)} images, such as {unknown[0]}, is not known; "
            "expected it, to resample them to "
            f"{'the others' if mpp is None else f'{mpp:g} um per pixel'}. Give mpp in "
            "dataset.json, or a column mpp in folds.csv."
        )
    return None
