"""Pixels of a PNG in half of Pillow's time, where that is safe: plain 8-bit RGB, not too large.

Pillow has read and verified the file before. What libspng gets is the header and the compressed
pixels alone, none of the other chunks; and where it refuses them, Pillow has the last word.
"""

import struct
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

try:
    import pyspng
except ModuleNotFoundError:  # it has wheels for few platforms
    pyspng = None

MAX_PIXELS = 4_000_000
"""pyspng does not let other threads run meanwhile: 60 ms at this size."""
_START = b"\x89PNG\r\n\x1a\n"
_PLAIN = (8, 2, 0, 0, 0)
"""Bits, colour type RGB, compression, filter, not interlaced."""
_HEADER_BYTES = 25
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""By colour type."""
_ADAM7 = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)
)  # fmt: skip
"""Of interlaced pixels each pass: its first column and row, and its steps along both."""
_MAX_PART = 2**20
_ENDS = struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))


def decode_plain_png(data: bytes) -> NDArray[np.uint8] | None:
    """The (H, W, 3) uint8 pixels of a verified PNG; None for one that is better left to Pillow."""
    if pyspng is None or not data.startswith(_START):
        return None
    kept: list[bytes | memoryview] = []
    before = b""
    for kind, chunk in _chunks(data):
        if not _is_plain(kind, chunk) or (kind == b"IDAT" != before and len(kept) > 1):
            return None
        if kind in (b"IHDR", b"IDAT"):
            kept.append(chunk)
        before = kind
    try:
        pixels = pyspng.load(b"".join((_START, *kept, _ENDS)), format="RGB")
    except RuntimeError:
        return None
    return np.asarray(pixels, np.uint8)


def is_cut_short(image: Image.Image, data: bytes) -> bool:
    """Whether a PNG's compressed pixels end before the size in its header is reached.

    Args:
        image: loaded; where it is black at its end, which is how Pillow leaves missing rows, they
            are counted.
        data: the file.
    """
    return image.format == "PNG" and _ends_black(image) and not has_all_rows(data)


def _ends_black(image: Image.Image) -> bool:
    last = image.crop((0, max(image.height - 2, 0), image.width, image.height))
    return any(not any(last.crop((0, row, last.width, row + 1)).tobytes()) for row in (0, 1))


def has_all_rows(data: bytes) -> bool:
    """Whether a PNG's compressed pixels are as many as its header says; unpacks them again."""
    chunks = list(_chunks(data))
    width, height, bits, color, _, _, is_interlaced = struct.unpack(">IIBBBBB", chunks[0][1][8:-4])
    needed = 0
    for left, top, across, down in _ADAM7 if is_interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        needed += rows * (1 + -(-columns * bits * _CHANNELS[color] // 8)) if columns > 0 else 0
    stream, found = zlib.decompressobj(), 0
    for kind, chunk in chunks:
        rest = bytes(chunk[8:-4]) if kind == b"IDAT" else b""
        while rest and found < needed:
            found += len(stream.decompress(rest, _MAX_PART))
            rest = stream.unconsumed_tail
    return found >= needed


def _is_plain(kind: bytes, chunk: memoryview) -> bool:
    """Whether nothing in the chunk changes what Pillow makes of the pixels."""
    if kind == b"IHDR" and len(chunk) == _HEADER_BYTES:
        width, height, *rest = struct.unpack(">IIBBBBB", chunk[8:-4])
        return tuple(rest) == _PLAIN and width * height <= MAX_PIXELS
    if kind in (b"tEXt", b"zTXt", b"iTXt"):  # may say which way is up
        keyword = bytes(chunk[8:40]).lower()
        return b"exif" not in keyword and b"xmp" not in keyword
    return kind not in (b"IHDR", b"tRNS", b"eXIf", b"acTL", b"iCCP")


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """The kind of each whole chunk, and all its bytes."""
    view, position = memoryview(data), len(_START)
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(view[position : position + 4])
        if end > len(data):
            return
        yield bytes(view[position + 4 : position + 8]), view[position:end]
        position = end
