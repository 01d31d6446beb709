"""Images that the toy model can label, and their encodings."""

import io
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from serve.images.decode import decode_picture
from tests.support.toy_bundle import REFERENCE_RGB


def painted(labels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """An (H, W, 3) image that the toy model labels as `labels`, (H, W) with 1..5."""
    return np.asarray(REFERENCE_RGB[labels - 1], np.uint8)


def blobs(
    height: int, width: int, *, seed: int = 0, noise: float = 20.0, scale: float = 1.0
) -> NDArray[np.uint8]:
    """A noisy (H, W, 3) image with large smooth regions of all five classes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    fields = [
        np.sin(x / scale / (90 + 9 * k) + 2 * k + seed) + np.cos(y / scale / (100 - 5 * k) + k)
        for k in range(5)
    ]
    image = painted(np.argmax(fields, axis=0) + 1)
    return np.clip(image + rng.normal(0, noise, image.shape), 0, 255).astype(np.uint8)


def encoded(image: Image.Image | NDArray[np.uint8], kind: str = "PNG", **options: object) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def swapped_profile() -> bytes:
    """sRGB whose red and blue are exchanged: what it does cannot be missed."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red, blue, other = b"rXYZ", b"bXYZ", b"xxxx"
    return srgb.replace(red, other).replace(blue, red).replace(other, blue)


def png_chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG, with the right checksum."""
    checksum = zlib.crc32(name + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + name + content + checksum


def rgb_png(width: int, height: int, *, bit_depth: int = 8, pixels: bytes = b"") -> bytes:
    """A PNG of which everything can be a lie, but the checksums are right."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bit_depth, 2, 0, 0, 0])
    chunks = (
        png_chunk(b"IHDR", header),
        png_chunk(b"IDAT", zlib.compress(pixels)),
        png_chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def decode_image(data: bytes, **limits: int) -> NDArray[np.uint8]:
    """The pixels of a file's content, (H, W, 3) uint8."""
    return decode_picture(data, **limits).pixels
