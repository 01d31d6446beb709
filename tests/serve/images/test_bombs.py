import struct
from collections.abc import Sequence

import pytest

from serve.contract.errors import ImageError
from serve.images.bombs import (
    MAX_EXIF_BYTES,
    MAX_JPEG_SCANS,
    MAX_JPEG_SEGMENTS,
    MAX_PNG_CHUNKS,
    MAX_TIFF_TAGS,
    MAX_TIFF_VALUES,
    refuse_bombs,
)
from serve.images.decode import decode_image
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


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_pillow_reads_it(name: str) -> None:
    with pytest.raises(ImageError) as raised:
        refuse_bombs(BOMBS[name])
    assert raised.value.code == "image_bomb"


@pytest.mark.parametrize("name", BOMBS)
def test_the_decoder_refuses_a_bomb_too(name: str) -> None:
    with pytest.raises(ImageError) as raised:
        decode_image(BOMBS[name], max_bytes=2**26)
    assert raised.value.code == "image_bomb"


def test_a_png_with_a_mebibyte_of_exif_is_refused() -> None:
    exif = tiff_of([(274, SHORT, 1, 6)]) + bytes(MAX_EXIF_BYTES)
    with pytest.raises(ImageError, match=r"^The image file has \d+ bytes of EXIF"):
        decode_image(png_with(png_chunk(b"eXIf", exif)))


@pytest.mark.parametrize(
    "content",
    [
        PNG,
        JPEG,
        PROGRESSIVE,
        jpeg_with_scans(MAX_JPEG_SCANS),
        jpeg_with(COMMENT * 100 + b"\xff" * 100),
        jpeg_with(b"\xff\xe2\xff\xff" + bytes(65_533)),
        png_with(png_chunk(b"prVt", b"") * 1000),
        encoded(SMALL, "TIFF"),
        encoded(SMALL, "TIFF", compression="tiff_lzw"),
        encoded(SMALL, "TIFF", big_tiff=True),
        encoded(SMALL, "WEBP"),
    ],
)
def test_what_programs_write_is_read(content: bytes) -> None:
    assert decode_image(content).shape == SMALL.shape


def test_large_metadata_that_stays_bytes_is_no_bomb() -> None:
    refuse_bombs(tiff_of([(METADATA, UNDEFINED, 2**24, 40)]))


@pytest.mark.parametrize("length", [*range(0, 40), 60, 90])
def test_a_head_that_ends_early_is_left_to_pillow(length: int) -> None:
    for content in (PNG, JPEG, encoded(SMALL, "TIFF"), BOMBS["strips, BigTIFF"][:38]):
        refuse_bombs(content[:length])


def test_folders_of_tags_that_lead_to_each_other_end() -> None:
    refuse_bombs(tiff_of([(EXIF, LONG, 1, 8)]))
