"""Finds and reads the files of a published data set."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

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


def read_region_image(path: Path) -> Image.Image:
    """Read an image of any size up to `MAX_REGION_MEGAPIXELS`.

    Pillow refuses such large images to guard against decompression bombs. We trust the data that
    a user prepares, up to our own limit.

    Raises:
        ImageFileError: the file cannot be read, or is too large.
    """
    pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_REGION_MEGAPIXELS * 1_000_000:
                raise ImageFileError(
                    f"{path} is {image.width} x {image.height} pixels; expected at most "
                    f"{MAX_REGION_MEGAPIXELS} megapixels. Cut the region into smaller ones."
                )
            image.load()
            return image
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ImageFileError(
            f"{path} cannot be read as an image ({error}). Copy or download it again, or remove it."
        ) from error
    finally:
        Image.MAX_IMAGE_PIXELS = pillow_limit


def read_region_rgb(path: Path) -> Image.Image:
    """Read an image as serving would: RGB of 8 bits, on white where it is transparent.

    Raises:
        ImageFileError: the file cannot be read, is too large, or has more than 8 bits.
    """
    image = read_region_image(path)
    if image.mode.startswith(("I", "F")):
        raise ImageFileError(
            f"{path} has more than 8 bits per channel (mode {image.mode}); expected RGB of 8 bits. "
            "Convert it, so that you choose which value is white."
        )
    if image.has_transparency_data:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")


def refuse_other_size(image_path: Path, size: tuple[int, int], labels: NDArray[np.uint8]) -> None:
    """Raise an ImageFileError if an image of (width, height) and its labels differ in size."""
    if size != labels.shape[::-1]:
        raise ImageFileError(
            f"the mask of {image_path} is {labels.shape[1]} x {labels.shape[0]} pixels, the image "
            f"{size[0]} x {size[1]}; expected the same size. Download both again."
        )


def read_glands(path: Path, gland: int = 2) -> NDArray[np.uint8]:
    """Read a mask of numbered glands as (H, W) uint8 labels: `gland`, and 1 for the rest.

    Raises:
        FocalPathError: the mask cannot be read, or is not one channel of numbers.
    """
    mask = read_region_image(path)
    # Accepts 16 bits, too: an image may have more than 255 glands.
    if mask.mode not in ("1", "L", "P", "I", "I;16"):
        raise MaskError(
            f"{path} has the mode {mask.mode}; expected one channel with the numbers of the "
            "glands, not a coloured picture of them. Download the published mask again."
        )
    return np.where(np.asarray(mask) > 0, gland, 1).astype(np.uint8)
