"""Small files that make a reader work far beyond their size, and heads of TIFFs to build more."""

import struct
from collections.abc import Sequence

from serve.images.bombs import (
    MAX_JPEG_SCANS,
    MAX_JPEG_SEGMENTS,
    MAX_PNG_CHUNKS,
    MAX_TIFF_TAGS,
    MAX_TIFF_VALUES,
)
from tests.support.pictures import blobs, encoded, png_chunk

SMALL = blobs(20, 30)
PNG = encoded(SMALL)
JPEG = encoded(SMALL, "JPEG")
PROGRESSIVE = encoded(SMALL, "JPEG", progressive=True)
SHORT, LONG, UNDEFINED = 3, 4, 7
STRIP_OFFSETS, EXIF, METADATA = 273, 34665, 50839


def tiff_of(
    tags: Sequence[tuple[int, int, int, int]], order: str = "<", *, is_big: bool = False
) -> bytes:
    """The head of a TIFF: tags of (number, type, values, where they are)."""
    start = {"<": b"II*\0", ">": b"MM\0*"}[order]
    count, entry, place = ("Q", "HHQQ", 16) if is_big else ("H", "HHLL", 8)
    head = b"II+\0" + struct.pack("<HHQ", 8, 0, place) if is_big else start
    head += b"" if is_big else struct.pack(order + "L", place)
    body = b"".join(struct.pack(order + entry, *tag) for tag in tags)
    return head + struct.pack(order + count, len(tags)) + body + bytes(8)


def png_with(*chunks: bytes) -> bytes:
    end = PNG.rindex(b"IEND") - 4
    return PNG[:end] + b"".join(chunks) + PNG[end:]


def jpeg_with(head: bytes) -> bytes:
    return JPEG[:2] + head + JPEG[2:]


def jpeg_with_scans(count: int) -> bytes:
    end = PROGRESSIVE.rindex(b"\xff\xd9")
    last = PROGRESSIVE.rindex(b"\xff\xda")
    more = count - PROGRESSIVE.count(b"\xff\xda")
    return PROGRESSIVE[:end] + PROGRESSIVE[last:end] * more + PROGRESSIVE[end:]


COMMENT = b"\xff\xfe\x00\x02"
BOMBS = {
    "chunks": png_with(png_chunk(b"prVt", b"") * MAX_PNG_CHUNKS),
    "comments": jpeg_with(COMMENT * MAX_JPEG_SEGMENTS),
    "filling": jpeg_with(b"\xff" * MAX_JPEG_SEGMENTS),
    "stray": jpeg_with(COMMENT + bytes(MAX_JPEG_SEGMENTS)),
    "header": jpeg_with((b"\xff\xe1\xff\xffExif\0\0" + bytes(65_527)) * 257),
    "scans": jpeg_with_scans(MAX_JPEG_SCANS + 1),
    "strips": tiff_of([(STRIP_OFFSETS, SHORT, MAX_TIFF_VALUES + 1, 40)]),
    "strips as bytes": tiff_of([(STRIP_OFFSETS, UNDEFINED, MAX_TIFF_VALUES + 1, 40)]),
    "strips, big-endian": tiff_of([(STRIP_OFFSETS, LONG, MAX_TIFF_VALUES + 1, 40)], ">"),
    "strips, BigTIFF": tiff_of([(STRIP_OFFSETS, LONG, MAX_TIFF_VALUES + 1, 40)], is_big=True),
    "tags": tiff_of([(1000, SHORT, 1, 0)] * (MAX_TIFF_TAGS + 1)),
    "tags, BigTIFF": b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, 2**40) + bytes(64),
    "EXIF": tiff_of([(EXIF, LONG, 1, 30)])
    + tiff_of([(METADATA, LONG, MAX_TIFF_VALUES + 1, 40)])[8:],
}
