"""Uploads to pixels: decode an image that may be broken, hostile or of an unusual kind.

Whatever comes in, what comes out is (H, W, 3) uint8 RGB, upright, or an `ImageError`.

The um per pixel that counts is the caller's, else the file's, else the model's, as an assumption.
A file's is believed from MIN_MPP to MAX_MPP: beyond, it is that of a screen or printer (72 dpi are
353 um per pixel), and the file says nothing. A caller's absurd value is refused instead.
"""

import html
import io
import math
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from serve.contract.errors import ImageError, ImageTooLargeError, OptionError
from serve.images.bombs import refuse_bombs, refuse_large_exif
from serve.images.png import decode_plain_png
from serve.settings import InferenceSettings

_DEFAULTS = InferenceSettings()
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP")
MIN_MPP, MAX_MPP = 0.05, 20.0
"""um per pixel: from oil immersion, oversampled, to an overview at half a magnification."""
_EXPECTED = "Send one PNG, JPEG, TIFF or WebP image with 8 bits a channel"
_PNG_BIT_DEPTH_OFFSET = 24
_TIFF_BITS_PER_SAMPLE = 258
_TIFF_DESCRIPTION = 270
_TIFF_RESOLUTION = (282, 283)
_TIFF_RESOLUTION_UNIT = 296
_TIFF_UM_PER_UNIT = {2: 25_400.0, 3: 10_000.0}
"""ResolutionUnit: inch, centimetre; 1 is none."""
_IMAGEJ_MICRON = ("unit=micron", "unit=um", "unit=\\u00b5m", "unit=\u00b5m")
"""How ImageJ, and so QuPath, says that the resolution is in pixels a micrometre."""
_OME_UM = {
    "m": 1e6,
    "cm": 1e4,
    "mm": 1e3,
    "\u00b5m": 1.0,
    "\u03bcm": 1.0,
    "um": 1.0,
    "nm": 1e-3,
    "\u00c5": 1e-4,
    "in": 25_400.0,
}
"""OME's units of length that a microscope's image may be in; µ is one of two characters."""
_OME_PIXELS = re.compile(r"<(?:\w{1,32}:)?Pixels\s([^<>]{1,8192})>")
_OME_SIZE = re.compile(r"\b(PhysicalSize[XY](?:Unit)?)\s*=\s*(?:\"([^\"]{0,64})\"|'([^']{0,64})')")
_APERIO_MPP = re.compile(r"\|\s*MPP\s*=\s*([0-9.]{1,32})\s*(?:\||$)")
_MAX_DESCRIPTION = 2**20
"""Characters of a TIFF's description that are searched."""
_MAX_ANISOTROPY = 0.01
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    RuntimeError,
    AttributeError,
    struct.error,
    zlib.error,
)
"""What Pillow's decoders raise on broken data: each plugin lets its own errors through."""


def decode_image(
    data: bytes,
    *,
    max_bytes: int = _DEFAULTS.max_upload_bytes,
    max_pixels: int = _DEFAULTS.max_image_pixels,
) -> NDArray[np.uint8]:
    """Decode a file's content, judged by the content alone and never by a name.

    EXIF orientation is applied, transparency is composited on white, grey and CMYK become RGB.
    Of a TIFF with several pages the first is taken: scanners put thumbnails behind it.

    Args:
        data: the bytes of a PNG, JPEG, TIFF or WebP file.
        max_bytes: the most bytes that are looked at.
        max_pixels: the most pixels, by the file's header, that are decoded.

    Returns:
        (H, W, 3) uint8, RGB in [0, 255].

    Raises:
        ImageTooLargeError: more bytes or pixels than allowed.
        ImageError: not such an image, truncated, damaged, animated or of more than 8 bits.
    """
    if len(data) > max_bytes:
        raise ImageTooLargeError(
            f"The file has {len(data)} bytes, at most {max_bytes} are accepted. "
            "Crop the image or compress it."
        )
    if not data:
        raise ImageError(f"The file is empty. {_EXPECTED}.")
    refuse_bombs(data)
    with _open(data, max_pixels) as image:
        _check_kind(image, data)
        try:
            image.verify()  # checks PNG's checksums, and leaves the image unusable
        except _DECODER_ERRORS as error:
            raise _damaged(error) from error
    if (pixels := decode_plain_png(data)) is not None:
        return pixels
    with _open(data, max_pixels) as image:
        try:
            image.load()
            refuse_large_exif(image.info.get("exif"))
            upright = ImageOps.exif_transpose(image)
            return np.array(_to_rgb(upright), np.uint8)
        except ImageError:
            raise
        except _DECODER_ERRORS as error:
            raise _damaged(error) from error


@dataclass(frozen=True)
class Picture:
    """A decoded image file."""

    pixels: NDArray[np.uint8]
    """(H, W, 3) uint8, RGB in [0, 255]."""
    mpp: float | None
    """um per pixel that the file states, if it does believably."""


def decode_picture(data: bytes, *, max_bytes: int, max_pixels: int) -> Picture:
    """Decode a file's content and what it says of its scale; see `decode_image`."""
    pixels = decode_image(data, max_bytes=max_bytes, max_pixels=max_pixels)
    return Picture(pixels, file_mpp(data))


def read_picture(path: Path, settings: InferenceSettings | None = None) -> Picture:
    """Read and decode an image file.

    Raises:
        ImageError: the file is missing, or `decode_image` refuses it; the message names the file.
    """
    settings = settings or InferenceSettings()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    try:
        return decode_picture(
            data, max_bytes=settings.max_upload_bytes, max_pixels=settings.max_image_pixels
        )
    except ImageError as error:
        raise type(error)(f"{path}: {error}") from error


def check_mpp(mpp: float) -> None:
    """Raise OptionError unless `mpp` is what a microscope can give."""
    if not MIN_MPP <= mpp <= MAX_MPP:  # false for not-a-number too
        raise OptionError(
            f"mpp is {mpp:g} um per pixel, expected {MIN_MPP:g} to {MAX_MPP:g}. Leave it out if it "
            "is not known."
        )


def file_mpp(data: bytes) -> float | None:
    """The um per pixel that a decodable PNG or TIFF states; None where it says nothing believable.

    Read are PNG's pHYs, OME-TIFF's PhysicalSizeX and Y, Aperio's MPP, and TIFF's resolution in
    inches, centimetres or ImageJ's micrometres.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            sizes = _tiff_mpp(image) if image.format == "TIFF" else _png_mpp(image)
    except (ArithmeticError, *_DECODER_ERRORS):
        return None
    if not all(math.isfinite(size) and MIN_MPP <= size <= MAX_MPP for size in sizes):
        return None
    if not sizes or abs(sizes[0] / sizes[1] - 1) > _MAX_ANISOTROPY:
        return None
    return sizes[0]


def _png_mpp(image: Image.Image) -> tuple[float, ...]:
    if image.format != "PNG" or "dpi" not in image.info:  # set for a pHYs chunk in metres
        return ()
    return tuple(25_400.0 / float(dpi) for dpi in image.info["dpi"])


def _tiff_mpp(image: Image.Image) -> tuple[float, ...]:
    tags = image.tag_v2  # type: ignore[attr-defined]
    description = str(tags.get(_TIFF_DESCRIPTION, ""))[:_MAX_DESCRIPTION]
    if (pixels := _OME_PIXELS.search(description)) is not None:
        return _ome_mpp(pixels[1])
    if description.startswith("Aperio") and (found := _APERIO_MPP.search(description)):
        return (float(found[1]),) * 2
    if any(tag not in tags for tag in _TIFF_RESOLUTION):
        return ()
    unit = tags.get(_TIFF_RESOLUTION_UNIT, 2)  # the default of TIFF 6.0
    um = _TIFF_UM_PER_UNIT.get(unit)
    if um is None and any(name in description for name in _IMAGEJ_MICRON):
        um = 1.0
    return () if um is None else tuple(um / float(tags[tag]) for tag in _TIFF_RESOLUTION)


def _ome_mpp(attributes: str) -> tuple[float, ...]:
    """PhysicalSizeX and Y of OME's Pixels element, by default in micrometres.

    Found as text: an XML parser would follow a hostile file's entities, and nothing else is needed.
    """
    # Pillow takes the description for Latin-1; OME's is UTF-8.
    readable = attributes.encode("latin-1", "replace").decode("utf-8", "replace")
    found = {
        name: html.unescape(double or single)
        for name, double, single in _OME_SIZE.findall(readable)
    }
    sizes = []
    for axis in "XY" if "PhysicalSizeY" in found else "XX":
        size = found.get(f"PhysicalSize{axis}")
        um = _OME_UM.get(found.get(f"PhysicalSize{axis}Unit", "um"))
        if size is None or um is None:
            return ()
        sizes.append(float(size) * um)
    return tuple(sizes)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header only; no pixel is decoded before the size is known to be allowed."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(
            f"The image is far larger than the {max_pixels} pixels that are accepted. Crop it."
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"The file is no image that can be read. {_EXPECTED}.") from error
    except _DECODER_ERRORS as error:
        raise _damaged(error) from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"The image is {width} x {height}: {width * height} pixels, at most {max_pixels} are "
            "accepted. Crop it."
        )
    if width == 0 or height == 0:
        raise ImageError(f"The image is {width} x {height}: it has no pixels. {_EXPECTED}.")
    return image


def _check_kind(image: Image.Image, data: bytes) -> None:
    """Refuse what would be converted silently and wrongly: deep channels and animations."""
    bits: tuple[int, ...] = (8,)
    if image.format == "PNG":
        bits = (data[_PNG_BIT_DEPTH_OFFSET],)  # Pillow quietly cuts 16-bit RGB to 8
    elif image.format == "TIFF":
        bits = image.tag_v2.get(_TIFF_BITS_PER_SAMPLE, (1,))  # type: ignore[attr-defined]
    if max(bits) > 8 or image.mode == "F" or image.mode.startswith("I"):
        raise ImageError(
            f"The image has {max(bits)} bits a channel (mode {image.mode}), expected 8. "
            "Convert it to 8 bits, so that you choose which value is white."
        )
    if image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1:
        raise ImageError(f"The image is an animation. {_EXPECTED}.")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data or image.mode in ("LA", "PA", "RGBA"):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _damaged(error: Exception) -> ImageError:
    reason = str(error).rstrip(".") or type(error).__name__
    return ImageError(f"The image is damaged or truncated: {reason}. {_EXPECTED}.")
