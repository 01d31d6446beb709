"""Colours of files that are not plain sRGB."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageCms
from skimage.color import lab2rgb

from serve.images.decode import decode_picture
from tests.support.pictures import blobs, encoded, swapped_profile

IMAGE = blobs(40, 60, noise=0)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_an_embedded_profile_is_applied_and_named(kind: str) -> None:
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    content = encoded(IMAGE, kind, icc_profile=swapped_profile(), **options.get(kind, {}))
    picture = decode_picture(content)
    difference = np.abs(picture.pixels.astype(int) - IMAGE[..., ::-1])
    assert np.percentile(difference, 99) <= 6
    assert len(picture.notes) == 1
    assert "sRGB" in picture.notes[0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_an_srgb_profile_changes_nothing_and_is_not_noted(kind: str) -> None:
    picture = decode_picture(encoded(IMAGE, kind, icc_profile=SRGB))
    assert np.array_equal(picture.pixels, IMAGE)
    assert picture.notes == ()


@pytest.mark.parametrize("profile", [b"no profile", SRGB[:200], SRGB + bytes(5 * 2**20)])
def test_a_profile_that_cannot_be_used_is_noted(profile: bytes) -> None:
    picture = decode_picture(encoded(IMAGE, "TIFF", icc_profile=profile))
    assert np.array_equal(picture.pixels, IMAGE)
    assert "not applied" in picture.notes[0]


def test_a_profile_of_other_channels_is_noted() -> None:
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    picture = decode_picture(encoded(cmyk, "TIFF", icc_profile=SRGB))
    assert picture.pixels[0, 0].tolist() == [255, 0, 0]
    assert any("not applied" in note for note in picture.notes)


@pytest.mark.parametrize(("mode", "middle", "shown"), [("1", 255, 255), ("LA", 128, 188)])
def test_a_profile_of_greys_is_applied_to_two_levels_and_to_grey_with_alpha(
    mode: str, middle: int, shown: int
) -> None:
    """Half of the light is 188 in sRGB; black and white stay."""
    grey = Image.fromarray(np.array([[0, middle, 255]], np.uint8))
    picture = decode_picture(encoded(grey.convert(mode), icc_profile=linear_grey_profile()))
    assert picture.pixels[0, :, 0].tolist() == [0, shown, 255]
    assert "not applied" not in "".join(picture.notes)


def linear_grey_profile() -> bytes:
    """Grey in steps of light (ICC.1, version 2)."""
    white = struct.pack(">3i", 63190, 65536, 54061)  # D50, in 1/65536
    description = b"desc" + bytes(4) + struct.pack(">I5s", 5, b"grey") + bytes(81)
    curve = b"curv" + bytes(4) + struct.pack(">IHH", 1, 256, 0)
    parts = {b"desc": description, b"wtpt": b"XYZ " + bytes(4) + white, b"kTRC": curve}
    table, body = struct.pack(">I", len(parts)), b""
    start = 128 + 4 + 12 * len(parts)
    for name, part in parts.items():
        table += name + struct.pack(">II", start + len(body), len(part))
        body += part + bytes(-len(part) % 4)
    head = struct.pack(
        ">II4s4s4s4s", start + len(body), 0, b"\2\x40\0\0", b"mntr", b"GRAY", b"XYZ "
    )
    return (head + bytes(12) + b"acsp" + bytes(28) + white).ljust(128, b"\0") + table + body


def test_cielab_becomes_srgb() -> None:
    lab = np.array([[[128, 10, 246], [200, 0, 0]]], np.uint8)
    picture = decode_picture(encoded(Image.fromarray(lab, "LAB"), "TIFF"))
    lightness = lab[..., :1] / 255 * 100
    expected = lab2rgb(np.concatenate([lightness, lab[..., 1:].astype(np.int8)], axis=-1)) * 255
    assert np.abs(picture.pixels - expected).max() <= 3
    assert picture.notes


def test_opaque_alpha_changes_nothing_and_is_not_noted() -> None:
    rgba = np.dstack([IMAGE, np.full(IMAGE.shape[:2], 255, np.uint8)])
    picture = decode_picture(encoded(rgba))
    assert np.array_equal(picture.pixels, IMAGE)
    assert picture.notes == ()
