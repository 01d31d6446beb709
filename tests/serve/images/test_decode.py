import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serve.contract.errors import ImageError, ImageTooLargeError
from serve.images.decode import FORMATS, decode_picture, read_head, read_picture
from tests.support.errors import raises
from tests.support.pictures import blobs, decode_image, encoded, rgb_png

IMAGE = blobs(40, 60)
ORIENTATION = 0x0112


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})]
)
def test_a_lossless_format_decodes_to_the_same_pixels(kind: str, options: dict[str, bool]) -> None:
    decoded = decode_image(encoded(IMAGE, kind, **options))
    assert np.array_equal(decoded, IMAGE)
    decoded[0, 0] = 0  # it can be written to


def test_a_jpeg_decodes_to_nearly_the_same_pixels() -> None:
    smooth = blobs(40, 60, noise=0)
    decoded = decode_image(encoded(smooth, "JPEG", quality=95)).astype(int)
    assert np.abs(decoded - smooth).mean() < 5


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the camera was turned: rotate clockwise to show it upright
    return exif


def palette() -> Image.Image:
    indexed = Image.fromarray(np.array([[0, 1]], np.uint8))
    indexed.putpalette([10, 20, 30, 40, 50, 60])
    return indexed


ALPHA = np.full(IMAGE.shape[:2], 255, np.uint8)
ALPHA[:10] = 0


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(IMAGE, exif=turned()), np.rot90(IMAGE, -1)),
        (encoded(np.dstack([IMAGE, ALPHA])), np.where(ALPHA[..., None] == 0, 255, IMAGE)),
        (encoded(palette(), transparency=0), [[[255, 255, 255], [40, 50, 60]]]),
        (encoded(IMAGE[..., 0]), np.dstack([IMAGE[..., 0]] * 3)),
        (encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"), [[[255, 0, 0]]]),
    ],
    ids=["turned", "transparent", "transparent colour of a palette", "grey", "CMYK"],
)
def test_pixels_become_upright_rgb_on_white(content: bytes, expected: object) -> None:
    assert np.array_equal(decode_image(content), expected)


def animation() -> bytes:
    frames = [Image.fromarray(IMAGE), Image.fromarray(255 - IMAGE)]
    return encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])


def with_a_wrong_checksum() -> bytes:
    png = bytearray(encoded(IMAGE))
    png[-13] ^= 1  # the last byte of the checksum of IDAT, just before IEND
    return bytes(png)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (encoded(Image.fromarray(np.zeros((4, 4), np.uint16))), "image_depth"),
        # Pillow would cut it to eight bits.
        (rgb_png(1, 1, bit_depth=16, pixels=b"\0" + bytes(6)), "image_depth"),
        (animation(), "image_animated"),
        (with_a_wrong_checksum(), "image_damaged"),
        (b"", "image_unusable"),
        (b"not an image", "image_unknown"),
        (b"\x89PNG\r\n\x1a\n", "image_unknown"),
    ],
)
def test_what_would_be_taken_for_something_else_is_refused(content: bytes, code: str) -> None:
    with raises(ImageError, code=code):
        decode_image(content)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_refused(kind: str, share: float) -> None:
    whole = encoded(IMAGE, kind)
    with pytest.raises(ImageError):
        decode_image(whole[: int(share * len(whole))])


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_random_damage_is_refused_or_decoded_and_nothing_else(kind: str) -> None:
    rng = random.Random(0)
    whole = encoded(IMAGE, kind)
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 3, 20])):
            damaged[rng.randrange(min(len(damaged), 300))] = rng.randrange(256)
        try:
            decoded = decode_image(bytes(damaged), max_pixels=10**6)
        except ImageError:
            continue
        assert decoded.dtype == np.uint8
        assert decoded.shape[2] == 3


@pytest.mark.parametrize(
    ("content", "limits", "named"),
    [
        (rgb_png(60_000, 60_000), {}, (64_000_000,)),
        (rgb_png(1001, 1000), {"max_pixels": 1_000_000}, ("1001 x 1000", 1_001_000, 1_000_000)),
        (encoded(IMAGE), {"max_bytes": 100}, (len(encoded(IMAGE)), 100)),
    ],
)
def test_more_pixels_or_bytes_than_allowed_are_refused_by_the_header(
    content: bytes, limits: dict[str, int], named: tuple[object, ...]
) -> None:
    with raises(ImageTooLargeError, *named):
        decode_image(content, **limits)


def test_a_file_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with raises(ImageError, tmp_path / "gone.png", "No such file"):
        read_picture(tmp_path / "gone.png")
    (tmp_path / "damaged.png").write_bytes(b"nothing")
    with raises(ImageError, tmp_path / "damaged.png", "PNG, JPEG, TIFF", code="image_unknown"):
        read_picture(tmp_path / "damaged.png")


def test_a_file_has_its_pixels_and_its_mpp_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "slide.jpg").write_bytes(encoded(IMAGE, dpi=(25_400, 25_400)))
    picture = read_picture(tmp_path / "slide.jpg")
    assert np.array_equal(picture.pixels, IMAGE)
    assert picture.mpp == pytest.approx(1.0)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_head_of_a_file_says_what_its_pixels_are(kind: str) -> None:
    size = {} if kind == "WEBP" else {"dpi": (101_600, 50_800)}
    content = encoded(blobs(30, 50), kind, **size)
    head, picture = read_head(content), decode_picture(content)
    assert (head.height, head.width) == picture.pixels.shape[:2]
    assert (head.pixel_size, head.mpp_source) == (picture.pixel_size, picture.mpp_source)


@pytest.mark.parametrize("content", [b"", b"no image", b"II*\0\x08\0\0\0"])
def test_what_has_no_head_is_refused_as_a_whole_file_is(content: bytes) -> None:
    with pytest.raises(ImageError) as of_head:
        read_head(content)
    with pytest.raises(ImageError) as of_file:
        decode_picture(content)
    assert (of_head.value.code, str(of_head.value)) == (of_file.value.code, str(of_file.value))


def test_the_head_of_a_large_image_is_refused_by_its_pixels() -> None:
    with raises(ImageTooLargeError, "50 x 30"):
        read_head(encoded(blobs(30, 50)), max_pixels=1_000)
