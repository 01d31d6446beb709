import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serve.contract.errors import ImageError, ImageTooLargeError, OptionError
from serve.images.decode import check_mpp, decode_image, file_mpp, read_picture
from tests.support.pictures import blobs, encoded, rgb_png

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
    with pytest.raises(ImageError, match="no image that can be read"):
        decode_image(encoded(IMAGE, "GIF"))


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
    with pytest.raises(ImageError, match="16 bits a channel"):
        decode_image(encoded(Image.fromarray(np.zeros((4, 4), np.uint16))))


def test_sixteen_bit_rgb_is_refused_although_pillow_would_cut_it_to_eight() -> None:
    deep = rgb_png(1, 1, bit_depth=16, pixels=b"\0" + bytes(6))
    with pytest.raises(ImageError, match="16 bits a channel"):
        decode_image(deep)


def test_a_float_tiff_is_refused() -> None:
    with pytest.raises(ImageError, match="32 bits a channel"):
        decode_image(encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))


def test_an_animation_is_refused() -> None:
    frames = [Image.fromarray(IMAGE), Image.fromarray(255 - IMAGE)]
    animation = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="an animation"):
        decode_image(animation)


def test_the_first_page_of_a_tiff_is_taken() -> None:
    thumbnail = Image.fromarray(IMAGE[::4, ::4])
    pages = encoded(IMAGE, "TIFF", save_all=True, append_images=[thumbnail])
    assert np.array_equal(decode_image(pages), IMAGE)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_refused(content: bytes) -> None:
    with pytest.raises(ImageError, match="Send one PNG, JPEG, TIFF or WebP image"):
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
    with pytest.raises(ImageError, match="damaged or truncated"):
        decode_image(bytes(png))


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
    with pytest.raises(ImageTooLargeError, match="far larger than the 64000000 pixels"):
        decode_image(rgb_png(60_000, 60_000))


def test_more_pixels_than_allowed_are_refused_by_the_header() -> None:
    with pytest.raises(ImageTooLargeError, match="1001 x 1000: 1001000 pixels, at most 1000000"):
        decode_image(rgb_png(1001, 1000), max_pixels=1_000_000)


def test_more_bytes_than_allowed_are_refused() -> None:
    with pytest.raises(ImageTooLargeError, match="at most 100 are accepted"):
        decode_image(encoded(IMAGE), max_bytes=100)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.png cannot be read: No such file"):
        read_picture(tmp_path / "gone.png")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "damaged.png").write_bytes(b"nothing")
    with pytest.raises(ImageError, match=r"damaged\.png: The file is no image"):
        read_picture(tmp_path / "damaged.png")


def test_the_name_of_a_file_says_nothing_of_its_format(tmp_path: Path) -> None:
    (tmp_path / "picture.jpg").write_bytes(encoded(IMAGE))
    assert np.array_equal(read_picture(tmp_path / "picture.jpg").pixels, IMAGE)


def test_what_is_returned_can_be_written_to() -> None:
    decode_image(io.BytesIO(encoded(IMAGE)).getvalue())[0, 0] = 0


X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT, DESCRIPTION = 282, 283, 296, 270
INCH, CENTIMETRE, NO_UNIT = 2, 3, 1


def _tiff(x: float, y: float, unit: int | None, description: str | bytes = "") -> bytes:
    tags = {X_RESOLUTION: x, Y_RESOLUTION: y, DESCRIPTION: description}
    if unit is not None:
        tags[RESOLUTION_UNIT] = unit
    return encoded(IMAGE, "TIFF", tiffinfo=tags)


def test_a_png_states_its_mpp_by_pixels_a_metre() -> None:
    assert file_mpp(encoded(IMAGE, dpi=(50_800, 50_800))) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("resolution", "unit", "description", "mpp"),
    [
        (40_000.0, CENTIMETRE, "", 0.25),
        (50_800.0, INCH, "", 0.5),
        (50_800.0, None, "", 0.5),
        (4.0, NO_UNIT, "ImageJ=1.53t\nunit=micron\n", 0.25),
        (4.0, NO_UNIT, "ImageJ=1.53t\nunit=um\n", 0.25),
    ],
)
def test_a_tiff_states_its_mpp_by_its_resolution(
    resolution: float, unit: int | None, description: str, mpp: float
) -> None:
    assert file_mpp(_tiff(resolution, resolution, unit, description)) == pytest.approx(mpp)


def _ome(attributes: str, before: str = "") -> bytes:
    """An OME-TIFF whose other tags say 72 dpi, as its writers do."""
    xml = (
        f'<?xml version="1.0" encoding="UTF-8"?>{before}<OME xmlns="http://www.openmicroscopy.org">'
        f'<Image ID="Image:0"><Pixels ID="Pixels:0" {attributes} SizeX="9"><Channel/></Pixels>'
    )
    return _tiff(72.0, 72.0, INCH, xml.encode())


@pytest.mark.parametrize(
    ("attributes", "mpp"),
    [
        ('PhysicalSizeX="0.25" PhysicalSizeY="0.25"', 0.25),
        ('PhysicalSizeX="0.25"', 0.25),
        ('PhysicalSizeX="0.5" PhysicalSizeXUnit="\u00b5m"', 0.5),
        ('PhysicalSizeX="0.5" PhysicalSizeXUnit="\u03bcm"', 0.5),
        ('PhysicalSizeX="0.5" PhysicalSizeXUnit="&#181;m"', 0.5),
        ("PhysicalSizeX='500' PhysicalSizeXUnit='nm'", 0.5),
        (
            'PhysicalSizeXUnit="mm" PhysicalSizeYUnit="nm" PhysicalSizeX="5e-4" '
            'PhysicalSizeY="500"',
            0.5,
        ),
    ],
)
def test_an_ome_tiff_states_its_mpp_in_its_description(attributes: str, mpp: float) -> None:
    assert file_mpp(_ome(attributes)) == pytest.approx(mpp)


@pytest.mark.parametrize(
    "attributes",
    [
        'PhysicalSizeX="1e9"',
        'PhysicalSizeX="0.001"',
        'PhysicalSizeX="-0.5"',
        'PhysicalSizeX="nan"',
        'PhysicalSizeX="half"',
        'PhysicalSizeX="0.5" PhysicalSizeXUnit="pixel"',
        'PhysicalSizeX="0.25" PhysicalSizeY="0.5"',
        'PhysicalSizeX="&size;"',
        'SizeY="9"',
    ],
)
def test_what_no_microscope_gives_is_none_in_an_ome_tiff_too(attributes: str) -> None:
    assert file_mpp(_ome(attributes)) is None


def test_entities_of_an_ome_tiff_are_not_expanded() -> None:
    entity = '<!DOCTYPE x [<!ENTITY size "0.5"><!ENTITY f SYSTEM "file:///etc/hostname">]>'
    assert file_mpp(_ome('PhysicalSizeX="&size;"', entity)) is None


@pytest.mark.parametrize(
    "text", ["<Pixels " * 100_000, "<Pixels " + "a" * 10**6, "Aperio" + "|MPP=" * 200_000]
)
def test_a_description_made_to_be_searched_for_hours_is_done_with_at_once(text: str) -> None:
    assert file_mpp(_tiff(72.0, 72.0, INCH, text)) is None


@pytest.mark.parametrize(
    ("description", "mpp"),
    [
        (
            "Aperio Image Library v11.2.1\r\n46000x32914 -> |AppMag = 40|MPP = 0.2525|Left = 1",
            0.2525,
        ),
        ("Aperio Leica Biosystems GT450|AppMag = 20|MPP = 0.5", 0.5),
        ("Aperio Image Library|AppMag = 20|MPP = 500|Left = 1", None),
        ("Aperio Image Library|AppMag = 20|MPP = 0.2.5|Left = 1", None),
        ("Another Library|MPP = 0.25|", None),
    ],
)
def test_an_aperio_slide_states_its_mpp(description: str, mpp: float | None) -> None:
    found = file_mpp(_tiff(72.0, 72.0, INCH, description))
    assert found == (None if mpp is None else pytest.approx(mpp))


@pytest.mark.parametrize(
    "content",
    [
        encoded(IMAGE),
        encoded(IMAGE, dpi=(72, 72)),
        encoded(IMAGE, "JPEG", dpi=(300, 300)),
        encoded(IMAGE, "WEBP"),
        _tiff(4.0, 4.0, NO_UNIT),
        _tiff(72.0, 72.0, INCH),
        _tiff(10.0**6, 10.0**6, CENTIMETRE),
        _tiff(0.0, 0.0, CENTIMETRE),
        _tiff(40_000.0, 20_000.0, CENTIMETRE),
        _tiff(40_000.0, 40_000.0, 77),
    ],
    ids=[
        "no resolution",
        "screen",
        "printer",
        "webp",
        "no unit",
        "screen tiff",
        "too fine",
        "zero",
        "unequal",
        "unknown unit",
    ],  # fmt: skip
)
def test_a_resolution_that_no_microscope_gives_is_none(content: bytes) -> None:
    assert file_mpp(content) is None


def test_a_picture_has_its_pixels_and_its_mpp(tmp_path: Path) -> None:
    (tmp_path / "slide.png").write_bytes(encoded(IMAGE, dpi=(25_400, 25_400)))
    picture = read_picture(tmp_path / "slide.png")
    assert np.array_equal(picture.pixels, IMAGE)
    assert picture.mpp == pytest.approx(1.0)


@pytest.mark.parametrize("mpp", [0.0, -1.0, 0.049, 20.1, float("nan"), float("inf")])
def test_an_absurd_mpp_is_refused(mpp: float) -> None:
    with pytest.raises(OptionError, match=r"um per pixel, expected 0\.05 to 20"):
        check_mpp(mpp)
