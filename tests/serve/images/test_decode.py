import io
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
    assert np.array_equal(decode_image(encoded(IMAGE, kind, **options)), IMAGE)


def test_a_jpeg_decodes_to_nearly_the_same_pixels() -> None:
    smooth = blobs(40, 60, noise=0)
    decoded = decode_image(encoded(smooth, "JPEG", quality=95)).astype(int)
    assert np.abs(decoded - smooth).mean() < 5


def test_a_gif_is_refused_although_pillow_could_read_it() -> None:
    with pytest.raises(ImageError) as raised:
        decode_image(encoded(IMAGE, "GIF"))
    assert raised.value.code == "image_unknown"


def test_the_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the camera was turned: rotate clockwise to show it upright
    decoded = decode_image(encoded(IMAGE, "PNG", exif=exif))
    assert np.array_equal(decoded, np.rot90(IMAGE, -1))


def test_transparent_pixels_become_white() -> None:
    rgba = np.dstack([IMAGE, np.full(IMAGE.shape[:2], 255, np.uint8)])
    rgba[:10, :, 3] = 0
    decoded = decode_image(encoded(rgba))
    assert (decoded[:10] == 255).all()
    assert np.array_equal(decoded[10:], IMAGE[10:])


def test_a_palette_with_a_transparent_colour_becomes_white_there() -> None:
    indexed = Image.fromarray(np.array([[0, 1]], np.uint8))
    indexed.putpalette([10, 20, 30, 40, 50, 60])
    decoded = decode_image(encoded(indexed, transparency=0))
    assert decoded.tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_grey_becomes_three_equal_channels() -> None:
    grey = IMAGE[..., 0]
    assert np.array_equal(decode_image(encoded(grey)), np.dstack([grey] * 3))


def test_cmyk_becomes_rgb() -> None:
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    assert decode_image(encoded(cmyk, "TIFF"))[0, 0].tolist() == [255, 0, 0]


def test_sixteen_bit_grey_is_refused() -> None:
    with pytest.raises(ImageError) as raised:
        decode_image(encoded(Image.fromarray(np.zeros((4, 4), np.uint16))))
    assert raised.value.code == "image_depth"


def test_sixteen_bit_rgb_is_refused_although_pillow_would_cut_it_to_eight() -> None:
    deep = rgb_png(1, 1, bit_depth=16, pixels=b"\0" + bytes(6))
    with pytest.raises(ImageError) as raised:
        decode_image(deep)
    assert raised.value.code == "image_depth"


def test_a_float_tiff_is_refused() -> None:
    with pytest.raises(ImageError) as raised:
        decode_image(encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))
    assert raised.value.code == "image_depth"


def test_an_animation_is_refused() -> None:
    frames = [Image.fromarray(IMAGE), Image.fromarray(255 - IMAGE)]
    animation = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError) as raised:
        decode_image(animation)
    assert raised.value.code == "image_animated"


def test_the_first_page_of_a_tiff_is_taken() -> None:
    thumbnail = Image.fromarray(IMAGE[::4, ::4])
    pages = encoded(IMAGE, "TIFF", save_all=True, append_images=[thumbnail])
    assert np.array_equal(decode_image(pages), IMAGE)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "image_unusable"),
        (b"not an image", "image_unknown"),
        (b"\x89PNG\r\n\x1a\n", "image_unknown"),
    ],
)
def test_what_is_no_image_is_refused(content: bytes, code: str) -> None:
    with raises(ImageError, "PNG", "JPEG", "TIFF", "WebP", code=code):
        decode_image(content)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_refused(kind: str, share: float) -> None:
    whole = encoded(IMAGE, kind)
    with pytest.raises(ImageError):
        decode_image(whole[: int(share * len(whole))])


def test_a_png_whose_pixels_do_not_match_their_checksum_is_refused() -> None:
    png = bytearray(encoded(IMAGE))
    png[-13] ^= 1  # the last byte of the checksum of IDAT, just before IEND
    with pytest.raises(ImageError) as raised:
        decode_image(bytes(png))
    assert raised.value.code == "image_damaged"


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


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    with raises(ImageTooLargeError, 64_000_000):
        decode_image(rgb_png(60_000, 60_000))


def test_more_pixels_than_allowed_are_refused_by_the_header() -> None:
    with raises(ImageTooLargeError, "1001 x 1000", 1_001_000, 1_000_000):
        decode_image(rgb_png(1001, 1000), max_pixels=1_000_000)


def test_more_bytes_than_allowed_are_refused() -> None:
    with raises(ImageTooLargeError, len(encoded(IMAGE)), 100):
        decode_image(encoded(IMAGE), max_bytes=100)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with raises(ImageError, tmp_path / "gone.png", "No such file"):
        read_picture(tmp_path / "gone.png")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "damaged.png").write_bytes(b"nothing")
    with raises(ImageError, tmp_path / "damaged.png", code="image_unknown"):
        read_picture(tmp_path / "damaged.png")


def test_the_name_of_a_file_says_nothing_of_its_format(tmp_path: Path) -> None:
    (tmp_path / "picture.jpg").write_bytes(encoded(IMAGE))
    assert np.array_equal(read_picture(tmp_path / "picture.jpg").pixels, IMAGE)


def test_what_is_returned_can_be_written_to() -> None:
    decode_image(io.BytesIO(encoded(IMAGE)).getvalue())[0, 0] = 0


def test_a_picture_has_its_pixels_and_its_mpp(tmp_path: Path) -> None:
    (tmp_path / "slide.png").write_bytes(encoded(IMAGE, dpi=(25_400, 25_400)))
    picture = read_picture(tmp_path / "slide.png")
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
