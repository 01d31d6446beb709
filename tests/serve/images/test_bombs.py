import pytest

from serve.contract.errors import ImageError
from serve.images.bombs import MAX_EXIF_BYTES, MAX_JPEG_SCANS, refuse_bombs
from tests.support.bombs import (
    BOMBS,
    COMMENT,
    EXIF,
    JPEG,
    LONG,
    METADATA,
    PNG,
    PROGRESSIVE,
    SHORT,
    SMALL,
    UNDEFINED,
    jpeg_with,
    jpeg_with_scans,
    png_with,
    tiff_of,
)
from tests.support.errors import raises
from tests.support.pictures import decode_image, encoded, png_chunk


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_pillow_reads_it(name: str) -> None:
    with raises(ImageError, code="image_bomb"):
        refuse_bombs(BOMBS[name])
    with raises(ImageError, code="image_bomb"):
        decode_image(BOMBS[name], max_bytes=2**26)


def test_a_png_with_a_mebibyte_of_exif_is_refused() -> None:
    exif = tiff_of([(274, SHORT, 1, 6)]) + bytes(MAX_EXIF_BYTES)
    with raises(ImageError, MAX_EXIF_BYTES, "EXIF", code="image_bomb"):
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
