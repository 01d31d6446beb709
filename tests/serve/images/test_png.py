import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from serve.images import png
from serve.images.png import decode_plain_png
from tests.support.pictures import blobs, decode_image, encoded

IMAGE = blobs(40, 50)
PNG = encoded(IMAGE)
HEADER_END = 33
PLATFORM_HAS_IT = pytest.mark.skipif(png.pyspng is None, reason="no wheel for this platform")


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def _with(kind: bytes, content: bytes) -> bytes:
    return PNG[:HEADER_END] + _chunk(kind, content) + PNG[HEADER_END:]


def _by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@PLATFORM_HAS_IT
@pytest.mark.parametrize("level", [0, 1, 9])
def test_a_plain_png_has_the_pixels_that_pillow_finds(level: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (70, 31, 3), np.uint8)
    for image in (noise, IMAGE):
        pixels = decode_plain_png(encoded(image, compress_level=level))
        assert pixels is not None
        assert np.array_equal(pixels, image)


@PLATFORM_HAS_IT
@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (b"gAMA", struct.pack(">I", 22_000)),
        (b"pHYs", struct.pack(">IIB", 4_000_000, 4_000_000, 1)),
        (b"tEXt", b"Software\0a scanner"),
    ],
)
def test_what_pillow_does_not_apply_is_not_applied(kind: bytes, content: bytes) -> None:
    pixels = decode_plain_png(_with(kind, content))
    assert pixels is not None
    assert np.array_equal(pixels, _by_pillow(PNG))


@pytest.mark.parametrize(
    "data",
    [
        _with(b"tRNS", struct.pack(">HHH", *IMAGE[0, 0].tolist())),
        _with(b"eXIf", b"MM\0*\0\0\0\x08\0\0"),
        _with(b"iCCP", b"profile\0\0" + zlib.compress(bytes(10))),
        _with(b"acTL", struct.pack(">II", 1, 0)),
        _with(b"tEXt", b"Raw profile type exif\0x"),
        _with(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x/>"),
        PNG[:-12] + _chunk(b"tEXt", b"a\0b") + _chunk(b"IDAT", b""),
        PNG[: len(PNG) // 2],
        encoded(IMAGE, "JPEG"),
        encoded(IMAGE[:, :, 0]),
        b"",
    ],
    ids=[
        "transparent", "exif", "profile", "animated", "exif in text", "xmp", "more pixels later",
        "truncated", "jpeg", "grey", "nothing",
    ],
)  # fmt: skip
def test_what_is_not_plain_is_left_to_pillow(data: bytes) -> None:
    assert decode_plain_png(data) is None


def test_a_large_png_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "MAX_PIXELS", 40 * 50 - 1)
    assert decode_plain_png(PNG) is None
    assert np.array_equal(decode_image(PNG), IMAGE)


def test_without_the_library_pillow_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "pyspng", None)
    assert decode_plain_png(PNG) is None
    assert np.array_equal(decode_image(PNG), IMAGE)


def test_damaged_bytes_are_refused_or_decoded_as_pillow_does() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        data = bytearray(PNG)
        for position in rng.integers(8, len(PNG), 2):
            data[position] = rng.integers(0, 256)
        pixels = decode_plain_png(bytes(data))
        if pixels is not None:
            assert np.array_equal(pixels, _by_pillow(bytes(data)))
