import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from serve.contract.errors import ImageError
from serve.images import png
from serve.images.png import decode_plain_png, has_all_rows
from tests.support.errors import raises
from tests.support.pictures import blobs, decode_image, encoded, png_chunk

IMAGE = blobs(40, 50)
PNG = encoded(IMAGE)
HEADER_END = 33
PLATFORM_HAS_IT = pytest.mark.skipif(png.pyspng is None, reason="no wheel for this platform")


def _with(kind: bytes, content: bytes) -> bytes:
    return PNG[:HEADER_END] + png_chunk(kind, content) + PNG[HEADER_END:]


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
        PNG[:-12] + png_chunk(b"tEXt", b"a\0b") + png_chunk(b"IDAT", b""),
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


@pytest.mark.parametrize("rows", [0, 1, 20, 38, 39])
@pytest.mark.parametrize(("color", "channels"), [(2, 3), (0, 1), (6, 4)])
def test_a_png_that_ends_before_its_last_row_is_refused(
    rows: int, color: int, channels: int
) -> None:
    image = np.full((40, 50, channels), 9, np.uint8)
    header = struct.pack(">IIBBBBB", 50, 40, 8, color, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in image[:rows]))
    chunks = [(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")]
    data = PNG[:8] + b"".join(png_chunk(kind, content) for kind, content in chunks)
    with raises(ImageError, code="image_damaged"):
        decode_image(data)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 7), (5, 8), (40, 51)])
@pytest.mark.parametrize("bits", [1, 8])
def test_a_whole_png_that_is_black_below_is_read(size: tuple[int, int], bits: int) -> None:
    black = Image.fromarray(np.zeros((*size, 3), np.uint8))
    assert not decode_image(encoded(black.convert("1") if bits == 1 else black)).any()
    assert has_all_rows(encoded(black))


@pytest.mark.parametrize("size", [(1, 1), (4, 5), (9, 8)])
@pytest.mark.parametrize(("bits", "channels"), [(1, 1), (8, 3)])
def test_interlaced_rows_are_counted(size: tuple[int, int], bits: int, channels: int) -> None:
    """Seven passes of PNG (ISO/IEC 15948, 8.2), each of the pixels that its grid holds."""
    height, width = size
    passes = np.zeros((8, 8), int)
    for number, (left, top, across, down) in enumerate(png._ADAM7):
        passes[top::down, left::across] = number
    grid = np.tile(passes, (2, 2))[:height, :width]
    length = 0
    for number in range(7):
        columns = (grid == number).sum(axis=1).max()
        rows = (grid == number).any(axis=1).sum()
        length += rows * (1 + -(-columns * bits * channels // 8)) if columns else 0
    header = struct.pack(">IIBBBBB", width, height, bits, 2 if channels == 3 else 0, 0, 0, 1)
    for missing in (0, 1):
        pixels = zlib.compress(bytes(length - missing))
        data = PNG[:8] + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + PNG[-12:]
        assert has_all_rows(data) != bool(missing)


def test_damaged_bytes_are_refused_or_decoded_as_pillow_does() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        data = bytearray(PNG)
        for position in rng.integers(8, len(PNG), 2):
            data[position] = rng.integers(0, 256)
        pixels = decode_plain_png(bytes(data))
        if pixels is not None:
            assert np.array_equal(pixels, _by_pillow(bytes(data)))
