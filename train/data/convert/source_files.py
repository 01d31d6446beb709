"""Finds and reads the files of a published data set."""

import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.images.decode import Picture
from train.data.images import read_picture
from train.data.mask_files import ONE_CHANNEL, greys_of, open_mask, whole_numbers
from train.errors import ImageFileError, MaskError, SourceError
from train.settings import is_name

MAX_REGION_MEGAPIXELS = 1000
"""Largest region that is read. One is in memory at a time, at 4 bytes per pixel plus copies."""


def find_images(
    folder: Path, suffixes: Sequence[str] = (".png",), kind: str = "image"
) -> dict[str, Path]:
    """Map the names of a folder's images, without suffix and sorted, to their paths.

    An umlaut may be one character or two, depending on the system that wrote the name.

    Args:
        folder: is not searched recursively.
        suffixes: with their dots; those of two parts, such as ".geojson.gz", stand before ".gz".
        kind: what the files are, for the errors.

    Raises:
        SourceError: there is no such folder, it has no such file, or two with the same name.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder; expected one with a file per {kind} in it")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        suffix = next((end for end in suffixes if path.name.lower().endswith(end)), None)
        if suffix is None or path.name.startswith("."):
            continue
        name = unicodedata.normalize("NFC", path.name[: -len(suffix)]).removesuffix(".ome")
        if not is_name(name):  # also where the name is not UTF-8
            raise SourceError(
                f"{str(path)!a} is called {name!a}, which folds.csv cannot hold; expected letters "
                f"in UTF-8 without spaces around them. Rename the {kind}."
            )
        if name in found:
            raise SourceError(
                f"{folder} has {found[name].name} and {path.name}; expected one {kind} of "
                "that name. Remove one of them."
            )
        found[name] = path
    if not found:
        raise SourceError(f"{folder} has no {kind}; expected {', '.join(suffixes)} files in it")
    return found


def find_folder(source: Path, names: Sequence[str], contents: str) -> Path:
    """Return the first of the subfolders `names` that exists.

    Raises:
        SourceError: none exists.
    """
    for name in names:
        if (source / name).is_dir():
            return source / name
    raise SourceError(
        f"{source} has no folder {' or '.join(names)}; expected {contents} there. Give the parent "
        "of that folder."
    )


def read_region_picture(path: Path) -> Picture:
    """Read an image as training and serving do, but up to `MAX_REGION_MEGAPIXELS`.

    Raises:
        ImageFileError: the file cannot be read, is too large, or would be read wrongly.
    """
    with _large_regions():
        return read_picture(path, max_megapixels=MAX_REGION_MEGAPIXELS)


def read_numbers(path: Path, what: str) -> NDArray[np.integer]:
    """Read a mask of one channel as its (H, W) numbers, of a palette of greys as these.

    Args:
        path: the file.
        what: the channel that is expected, for the error.

    Raises:
        MaskError: the mask cannot be read, or has colours.
    """
    with _large_regions():
        mask = open_mask(path)
    if mask.mode not in (*ONE_CHANNEL, "P"):
        raise MaskError(
            f"{path} has the mode {mask.mode}; expected {what}, not a coloured picture of them. "
            "Download the published mask again."
        )
    greys = greys_of(mask) if mask.mode == "P" else None
    return whole_numbers(mask) if greys is None else greys


@contextmanager
def _large_regions() -> Iterator[None]:
    """Pillow guards against decompression bombs; we trust the data that a user prepares."""
    pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = pillow_limit


def refuse_turned(image_path: Path, picture: Picture) -> None:
    """Raise an ImageFileError if EXIF turns an image: nothing says which way its mask is up."""
    if picture.orientation != 1:
        raise ImageFileError(
            f"{image_path} is turned by its EXIF orientation {picture.orientation}, and its mask "
            "may not be; expected an image without one, as published. Download it again."
        )


def refuse_other_size(
    image_path: Path, pixels: NDArray[np.uint8], labels: NDArray[np.uint8]
) -> None:
    """Raise an ImageFileError if an image (H, W, 3) and its labels (H, W) differ in size."""
    height, width, _ = pixels.shape
    if (height, width) != labels.shape:
        raise ImageFileError(
            f"the mask of {image_path} is {labels.shape[1]} x {labels.shape[0]} pixels, the image "
            f"{width} x {height}; expected the same size. Download both again."
        )


def read_glands(path: Path, gland: int = 2) -> NDArray[np.uint8]:
    """Read a mask of numbered glands as (H, W) uint8 labels: `gland`, and 1 for the rest.

    Raises:
        MaskError: the mask cannot be read, or is not one channel of numbers.
    """
    numbers = read_numbers(path, "one channel with the numbers of the glands")
    return np.where(numbers > 0, gland, 1).astype(np.uint8)
