"""Files of masks: opened, turned upright, and what their pixels are before they mean labels."""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from serve.contract.errors import ImageError
from serve.images.colors import repair_palette
from serve.images.kinds import HEAD_BYTES, kind_of
from serve.images.png import is_cut_short
from serve.images.refusals import DECODER_ERRORS
from serve.images.tiff import is_tiff
from serve.images.tiff_codecs import whole_tiff
from train.errors import MaskError

ONE_CHANNEL = ("1", "L", "I", "I;16", "I;16B", "I;16L", "I;16N")
_UNREADABLE = (*DECODER_ERRORS, Image.DecompressionBombError, ImageError)
_LOSSY_FORMATS = ("JPEG", "MPO", "WEBP", "JPEG2000", "AVIF")
_LOSSY_COMPRESSIONS = ("jpeg", "tiff_jpeg", "webp", "jpeg2000")
"""Of TIFF, as Pillow calls them."""
_ORIENTATION = 0x0112


def open_mask(path: Path) -> Image.Image:
    """Read the file of a mask, upright.

    Raises:
        MaskError: it cannot be read, is lossy, holds several pages, or channels of 16 bits.
    """
    try:
        content = _content(path)
        with Image.open(io.BytesIO(content)) as image:
            if (pages := getattr(image, "n_frames", 1)) > 1:
                raise MaskError(f"{path} holds {pages} pages, expected one. Save the mask alone.")
            if (how := _lossy(image)) is not None:
                raise MaskError(
                    f"{path} is {how}, which may change labels along edges; expected lossless "
                    "pixels. Save the mask as PNG where it was made."
                )
            step = _step_of(image)
            is_packed = image.mode == "P" and "P;" in _stored(image)
            if ";16" in _stored(image) and len(image.getbands()) > 1:
                raise MaskError(
                    f"{path} has {len(image.getbands())} channels of 16 bits, expected one of up "
                    "to 32 bits, or colours of 8. Save the mask with 8 bits per channel."
                )
            image.load()
            if is_cut_short(image, content):
                raise EOFError("it ends before its last row")
            repair_palette(image)
            if is_packed and lacks_colors(image):
                raise MaskError(
                    f"{path} has pixels without a colour in its palette: the program that wrote "
                    "it had more values than colours, and may have cut them off. Save the mask "
                    "again, as greys or with a colour per value."
                )
            upright = ImageOps.exif_transpose(image)
            return upright if step == 1 else upright.point(lambda value: value // step)
    except MaskError:
        raise
    except UnidentifiedImageError as error:
        kind = kind_of(content[:HEAD_BYTES]) or "not an image that can be read"
        raise MaskError(
            f"{path} is {kind}; expected a mask in PNG, TIFF, BMP or GIF. Save it as PNG."
        ) from error
    except _UNREADABLE as error:
        raise MaskError(
            f"{path} cannot be read as a mask ({error}). Replace the file, or leave it out."
        ) from error


def _content(path: Path) -> bytes:
    """The bytes of a file; of a TIFF, as Pillow reads it."""
    content = path.read_bytes()
    return whole_tiff(content) if is_tiff(content) else content


def _lossy(image: Image.Image) -> str | None:
    """How a file stores its pixels, where that changes them, whatever its name says."""
    if image.format in _LOSSY_FORMATS:
        return f"a {image.format}"
    compression = image.info.get("compression") if image.format == "TIFF" else None
    return f"a TIFF with {compression}" if compression in _LOSSY_COMPRESSIONS else None


def _step_of(image: Image.Image) -> int:
    """By how much Pillow multiplies the values of 2 or 4 bits when it loads an image."""
    stored = _stored(image)
    return 85 if "L;2" in stored else 17 if "L;4" in stored else 1


def _stored(image: Image.Image) -> str:
    """How the pixels of a file that is not loaded yet are to be unpacked."""
    return str(getattr(image, "tile", ""))


def transparent_pixels(path: Path, image: Image.Image) -> NDArray[np.bool_] | None:
    """Where a mask is transparent; None where it has no transparency. Half of it is refused."""
    key = image.info.get("transparency")  # a value, a colour, or the alpha of each index
    if "A" in image.getbands():
        alpha = np.asarray(image.getchannel("A"))
    elif key is None:
        return None
    elif isinstance(key, bytes):
        alpha = np.frombuffer(key.ljust(256, b"\xff"), np.uint8)[np.asarray(image)]
    else:
        is_key = np.asarray(image) == key
        return is_key if is_key.ndim == 2 else np.asarray(is_key.all(axis=2))
    if not np.isin(alpha, (0, 255)).all():
        raise MaskError(
            f"{path} has pixels that are half transparent; expected opaque or fully transparent "
            "ones. Save the mask without transparency and smoothing.",
        )
    return np.asarray(alpha == 0)


def has_orientation(path: Path) -> bool:
    """Whether a mask's file says itself which way is up."""
    with Image.open(io.BytesIO(_content(path))) as image:
        return _ORIENTATION in image.getexif()


def turn_upright(labels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn (H, W) labels as an image of an EXIF orientation is turned."""
    image = Image.fromarray(labels)
    image.getexif()[_ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(image))


def whole_numbers(image: Image.Image) -> NDArray[np.integer]:
    """The (H, W) values of a mask of one channel, or the indices of a palette."""
    values = np.asarray(image)
    return values.astype(np.uint8) if values.dtype == bool else values


def greys_of(image: Image.Image) -> NDArray[np.uint8] | None:
    """The (H, W) greys of a palette image.

    None where its palette has a colour, used or not, and where the greys tell less than the
    indices: two values have one grey, or a value has none.
    """
    indices, palette = np.asarray(image), palette_of(image)
    used = used_values(indices)
    is_grey = (palette == palette[:, :1]).all()
    if not is_grey or lacks_colors(image) or len(set(palette[used, 0].tolist())) < len(used):
        return None
    return np.asarray(palette[:, 0][indices])


def lacks_colors(image: Image.Image) -> bool:
    """Whether a palette image has pixels for which its file has no colour."""
    stored = image.getpalette("RGB") or []
    return int(np.asarray(image).max(initial=0)) >= len(stored) // 3


def palette_of(image: Image.Image) -> NDArray[np.uint8]:
    """(256, 3) uint8 RGB; colours that a file leaves out are black."""
    stored = image.getpalette("RGB") or []
    return np.array([*stored, *([0] * (768 - len(stored)))], np.uint8).reshape(256, 3)


def used_values(indices: NDArray[np.uint8]) -> list[int]:
    """The values that occur, in their order."""
    return np.flatnonzero(np.bincount(indices.ravel(), minlength=256)).tolist()
