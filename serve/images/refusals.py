"""Which image files are refused, and what is said of them."""

import struct
import zlib

from PIL import Image

from serve.contract.errors import ImageError, ImageTooLargeError
from serve.images.kinds import HEAD_BYTES, jpeg_frame, kind_of

DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    RuntimeError,
    AttributeError,
    struct.error,
    zlib.error,
)
"""What Pillow's decoders raise on broken data: each plugin lets its own errors through."""
_EXPECTED = "Send one PNG, JPEG, TIFF or WebP image with 8 bits per channel"
_PNG_BIT_DEPTH_OFFSET = 24


def refuse_bytes(data: bytes, max_bytes: int) -> None:
    """Refuse an empty file, and one of too many bytes."""
    if len(data) > max_bytes:
        raise ImageTooLargeError(
            f"The file has {len(data)} bytes, at most {max_bytes} are accepted. "
            "Crop the image or compress it."
        )
    if not data:
        raise ImageError(f"The file is empty. {_EXPECTED}.")


def unknown_file(data: bytes) -> ImageError:
    """The error of a file that Pillow does not know, or knows and does not read."""
    bits, is_lossless_kind = jpeg_frame(data)
    if bits > 8:
        return _too_deep(bits, "JPEG")
    found = "a JPEG-LS image" if is_lossless_kind else kind_of(data[:HEAD_BYTES])
    named = "not an image that can be read" if found is None else f"{found}, which is not read"
    return ImageError(f"The file is {named}. {_EXPECTED}.", code="image_unknown")


def refuse_size(width: int, height: int, max_pixels: int) -> None:
    """Refuse an image without pixels, and one of too many."""
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"The image is {width} x {height}: {width * height} pixels, at most {max_pixels} are "
            "accepted. Crop it."
        )
    if width <= 0 or height <= 0:
        raise ImageError(f"The image is {width} x {height}: it has no pixels. {_EXPECTED}.")


def refuse_kind(image: Image.Image, data: bytes) -> None:
    """Refuse what would be converted silently and wrongly: deep channels and animations."""
    bits = 8
    if image.format == "PNG":
        bits = data[_PNG_BIT_DEPTH_OFFSET]  # Pillow quietly cuts 16-bit RGB to 8
    if bits > 8 or image.mode == "F" or image.mode.startswith("I"):
        raise _too_deep(bits, f"mode {image.mode}")
    if image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1:
        raise ImageError(f"The image is an animation. {_EXPECTED}.", code="image_animated")


def _too_deep(bits: int, kind: str) -> ImageError:
    return ImageError(
        f"The image has {bits} bits per channel ({kind}), expected 8. Convert it to 8 bits, so "
        "that you choose which value is white.",
        code="image_depth",
    )


def damaged_file(error: Exception) -> ImageError:
    """The error of a file that a decoder could not read."""
    reason = str(error).rstrip(".") or type(error).__name__
    return ImageError(
        f"The image is damaged or truncated: {reason}. {_EXPECTED}.", code="image_damaged"
    )
