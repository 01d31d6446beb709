"""JPEGs whose pixels are not all there, though they end as they should."""

import io

from PIL import Image

from serve.images.kinds import JPEG_SCAN, jpeg_segments

_END = b"\xff\xd9"
_HUFFMAN_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
"""Baseline, extended, progressive: what scanners and programs write."""
_MISSING = frozenset({127, 128})
"""All channels of pixels that libjpeg had no data for."""
_MORE = bytes(range(1, 251)) * 4
"""Any bytes that are no marker."""


def is_cut_short(image: Image.Image, data: bytes) -> bool:
    """Whether a JPEG's data end before its last pixel, with an end marker set behind them.

    libjpeg makes the missing pixels grey, or those of a progressive file coarse, and Pillow does
    not pass its warning on. Bytes added before the marker change them; they change nothing where
    all data are there. That costs to decode it twice, and is done only where the last pixel is
    such a grey, or the file is progressive.

    Args:
        image: loaded.
        data: the file.
    """
    if image.format not in ("JPEG", "MPO"):
        return False
    width, height = image.size
    last = image.crop((width - 1, height - 1, width, height)).tobytes()
    if "progressive" not in image.info and not _MISSING.issuperset(last):
        return False
    segments = dict(jpeg_segments(data))
    end = data.find(_END, segments.get(JPEG_SCAN, len(data)))
    if end < 0 or not _HUFFMAN_FRAMES & segments.keys():
        return False
    with Image.open(io.BytesIO(data[:end] + _MORE + data[end:]), formats=("JPEG",)) as again:
        return again.tobytes() != image.tobytes()
