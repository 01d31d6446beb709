"""Images of a data set, read as serving reads them, and what their files state."""

import functools
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from rich.progress import track

from serve.contract.errors import ImageError
from serve.images.decode import TRANSPOSED, Picture, decode_picture
from serve.images.mpp import PixelSize, check_aspect
from serve.images.tiff import is_tiff
from serve.settings import MEBIBYTE, MEGAPIXEL, PILLOW_LIMIT_MEGAPIXELS
from train.errors import FocalPathError, ImageFileError, ScaleError

_MAX_MEBIBYTES = 4096
"""Largest image file of a data set. The user's own files may be larger than an upload."""


def read_picture(path: Path, max_megapixels: int = PILLOW_LIMIT_MEGAPIXELS) -> Picture:
    """Read an image as serving does; see `serve.images.decode`.

    Raises:
        ImageFileError: the file is missing, damaged, or of a kind that would be read wrongly.
    """
    try:
        return decode_picture(
            path.read_bytes(),
            max_bytes=_MAX_MEBIBYTES * MEBIBYTE,
            max_pixels=max_megapixels * MEGAPIXEL,
        )
    except (ImageError, OSError) as error:
        raise _unreadable(path, error) from error


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read an image as serving does: (H, W, 3) uint8, RGB in [0, 255], upright, no alpha.

    Raises:
        ImageFileError: see `read_picture`.
    """
    return read_picture(path).pixels


@dataclass(frozen=True)
class ImageFacts:
    """What is remembered of an image after it was checked."""

    height: int
    width: int
    pixel_size: PixelSize | None
    """um per pixel along each axis that the file itself states, upright as the image."""
    mpp_source: str
    """The part of the file that states it."""
    orientation: int
    """Of the stored pixels, as EXIF has it; 1 is upright."""
    digest: str
    """Of the size and pixels, to find copies; empty where all pixels are the same."""


def inspect_image(path: Path) -> ImageFacts:
    """Decode an image to check it; once per process while the file stays the same.

    Raises:
        ImageFileError: see `read_picture`.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return _inspect(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=2**17)
def _inspect(path: Path, _: int, __: int) -> ImageFacts:
    picture = read_picture(path)
    height, width, _channels = picture.pixels.shape
    return ImageFacts(
        height,
        width,
        picture.pixel_size,
        picture.mpp_source,
        picture.orientation,
        _digest(picture.pixels),
    )


def _digest(pixels: NDArray[np.uint8]) -> str:
    if (pixels == pixels[0, 0]).all():
        return ""
    found = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    found.update(np.ascontiguousarray(pixels).data)
    return found.hexdigest()


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image, upright: from its header, or of a TIFF's page that is read.

    Raises:
        ImageFileError: the file is not an image.
    """
    try:
        with path.open("rb") as file:
            is_paged = is_tiff(file.read(4))
        if is_paged:
            facts = inspect_image(path)
            return facts.height, facts.width
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112) in TRANSPOSED
            width, height = image.size
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise _unreadable(path, error) from error
    return (width, height) if turned else (height, width)


def _unreadable(path: Path, error: Exception) -> ImageFileError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return ImageFileError(
        f"{path} cannot be read as an image: {reason.rstrip('.')}. Replace the file, or leave "
        "it out."
    )


def refuse_unequal_sides(size: PixelSize, what: str, advice: str) -> None:
    """Raise ScaleError for pixels that serving would refuse, as they are too far from squares."""
    try:
        check_aspect(size, what)
    except ImageError as error:
        raise ScaleError(f"{error} {advice}") from error


def own_pixel_sizes(paths: Sequence[Path]) -> list[PixelSize | None]:
    """The um per pixel that each file itself states, as serving reads them.

    None for a file that states none, and for one that cannot be read: `require_trainable` names it.

    Raises:
        ScaleError: a file states sides of a pixel that are too unequal.
    """

    def of(path: Path) -> PixelSize | None:
        try:
            facts = inspect_image(path)
        except FocalPathError:
            return None
        if facts.pixel_size is not None:
            advice = "Give mpp in dataset.json, or a column mpp in folds.csv."
            refuse_unequal_sides(facts.pixel_size, f"{path}: its {facts.mpp_source}", advice)
        return facts.pixel_size

    with ThreadPoolExecutor() as pool:
        return list(track(pool.map(of, paths), "Reading um per pixel", total=len(paths)))
