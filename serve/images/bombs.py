"""Files that are small to send and ruinous to read: found before Pillow is given them.

The number of pixels says little about them. Pillow reads the structure of a file in Python, segment
by segment: 64 MiB of empty ones keep a core busy for minutes, and a TIFF's tables of strips become
Python integers, thirty times as large. The limits are ours, far above what cameras, scanners and
image programs write.
"""

import struct

from serve.contract.errors import ImageError
from serve.images.tiff_tags import MAX_TAGS, STARTS, Structure, Tag

MAX_PNG_CHUNKS = 65_536
"""64 MiB in chunks of 1 KiB; encoders write 8 KiB and more."""
MAX_JPEG_SEGMENTS = 4_096
"""Segments, and stray bytes between them, before the pixels."""
MAX_JPEG_HEADER_BYTES = 16 * 2**20
MAX_JPEG_SCANS = 128
"""A progressive file has about ten; each goes over all pixels."""
MAX_TIFF_TAGS = MAX_TAGS
MAX_TIFF_VALUES = 131_072
"""Values of one tag: strips of one row of the tallest image, or 64 megapixels in tiles of 32."""
MAX_EXIF_BYTES = 2**20

_PNG_START = b"\x89PNG\r\n\x1a\n"
_JPEG_START = b"\xff\xd8"
_JPEG_SCAN = 0xDA
_JPEG_ALONE = frozenset({0x01, *range(0xD0, 0xDA)})
"""Markers without a length after them."""
_TIFF_TEXT_TYPES = (1, 2, 7)
"""BYTE, ASCII and UNDEFINED: Pillow leaves them as they are."""
_TIFF_LAYOUT_TAGS = frozenset({258, 273, 277, 279, 320, 324, 325, 338, 339})
"""Bits, strips, tiles, colours, samples: Pillow goes through them value by value."""
_TIFF_FOLDER_TAGS = (34665, 34853, 40965)
"""EXIF, GPS and interoperability: folders of tags of their own, which Pillow reads too."""


def refuse_bombs(data: bytes) -> None:
    """Raise ImageError for a PNG, JPEG or TIFF that would take far more than its size is worth."""
    if data.startswith(_PNG_START):
        _check_png(data)
    elif data.startswith(_JPEG_START):
        _check_jpeg(data)
    elif data.startswith(STARTS):
        _check_tiff(data)


def refuse_large_exif(exif: object) -> None:
    """Raise ImageError for EXIF of a size that only a bomb has."""
    if isinstance(exif, bytes) and len(exif) > MAX_EXIF_BYTES:
        raise _bomb(f"{len(exif)} bytes of EXIF", MAX_EXIF_BYTES)


def _check_png(data: bytes) -> None:
    position = len(_PNG_START)
    for _ in range(MAX_PNG_CHUNKS):
        if position + 8 > len(data):
            return
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    raise _bomb("too many chunks", MAX_PNG_CHUNKS)


def _check_jpeg(data: bytes) -> None:
    position = len(_JPEG_START)
    for _ in range(MAX_JPEG_SEGMENTS):
        if position + 2 > len(data):
            return
        marker = data[position + 1]
        if data[position] != 0xFF or marker in (0x00, 0xFF):  # stray bytes: Pillow skips them
            position += 1
        elif marker == _JPEG_SCAN:
            break
        elif marker in _JPEG_ALONE:
            position += 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    else:
        raise _bomb("too many segments", MAX_JPEG_SEGMENTS)
    if position > MAX_JPEG_HEADER_BYTES:
        raise _bomb(f"a header of {position} bytes", MAX_JPEG_HEADER_BYTES)
    scans = data.count(
        bytes((0xFF, _JPEG_SCAN)), position
    )  # between the pixels' bytes no such pair
    if scans > MAX_JPEG_SCANS:
        raise _bomb(f"{scans} scans", MAX_JPEG_SCANS)


def _check_tiff(data: bytes) -> None:
    """Check the folders of tags that Pillow reads of the first page."""
    structure = Structure(data)
    try:
        places, seen = [structure.first], set[int]()
        while places:
            place = places.pop()
            if place in seen:
                continue
            seen.add(place)
            if (num_tags := structure.num_tags(place)) > MAX_TIFF_TAGS:
                raise _bomb(f"{num_tags} tags", MAX_TIFF_TAGS)
            for tag in structure.tags(place):
                _check_tag(tag)
                if tag.number in _TIFF_FOLDER_TAGS and len(seen) < 2 * len(_TIFF_FOLDER_TAGS):
                    places.append(tag.value)
    except (struct.error, ArithmeticError):
        return  # truncated: Pillow says so


def _check_tag(tag: Tag) -> None:
    is_text = tag.kind in _TIFF_TEXT_TYPES and tag.number not in _TIFF_LAYOUT_TAGS
    if tag.num_values > MAX_TIFF_VALUES and not is_text:
        raise _bomb(f"{tag.num_values} values in tag {tag.number}", MAX_TIFF_VALUES)


def _bomb(found: str, limit: int) -> ImageError:
    return ImageError(
        f"The image file has {found}, at most {limit} are accepted: it would cost far more to read "
        "than it weighs. Write it again with another program.",
        code="image_bomb",
    )
