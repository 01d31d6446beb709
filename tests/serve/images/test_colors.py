"""Colours of files that are not plain sRGB."""

import numpy as np
import pytest
from PIL import Image, ImageCms
from skimage.color import lab2rgb

from serve.images.decode import decode_picture
from tests.support.pictures import blobs, encoded

IMAGE = blobs(40, 60, noise=0)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped_profile() -> bytes:
    """An RGB profile whose red and blue primaries are exchanged: what it does cannot be missed."""
    profile = bytearray(SRGB)
    count = int.from_bytes(profile[128:132], "big")
    entries = {
        bytes(profile[place : place + 4]): place for place in range(132, 132 + 12 * count, 12)
    }
    red, blue = entries[b"rXYZ"], entries[b"bXYZ"]
    where = slice(red + 4, red + 12), slice(blue + 4, blue + 12)
    profile[where[0]], profile[where[1]] = profile[where[1]], profile[where[0]]
    return bytes(profile)


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
