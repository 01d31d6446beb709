"""A file that is not read is called what it is."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from serve.contract.errors import ImageError
from serve.images.decode import decode_picture
from serve.images.readers.errors import SlideFormatError
from serve.images.readers.registry import open_reader
from tests.support.errors import raises
from tests.support.pictures import decode_image
from tests.support.slides import tissue_pixels


def saved(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(tissue_pixels(24, 32)).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (saved("BMP"), "BMP"),
        (saved("GIF"), "GIF"),
        (saved("PPM"), "PPM"),
        (saved("JPEG2000"), "JPEG 2000"),
        (saved("JPEG2000", no_jp2=True), "JPEG 2000"),
        (saved("PDF"), "PDF"),
        (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\xff\x0a" + bytes(20), "JPEG XL"),
        (b"II\xbc\x01" + bytes(20), "JPEG XR"),
        (b"\xff\xd8\xff\xf7\x00\x0b\x08" + bytes(20), "JPEG-LS"),
        (b"\x00\x00\x00\x1cftypavif" + bytes(20), "AVIF"),
        (b"\x00\x00\x00\x18ftypmif1" + bytes(20), "HEIC"),
        (b"\x00\x00\x00\x18ftypisom" + bytes(20), "video"),
        (bytes(128) + b"DICM" + bytes(20), "DICOM"),
        (b"PK\x03\x04" + bytes(20), "zip"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(20), "7z"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(20), "OLE"),
        (b"\x70\0\0\0\x10\0\0\0\x2a" + bytes(20), "LIF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
        (base64.b64encode(saved("PNG")), "Base64"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html>", "HTML"),
    ],
)
def test_a_file_of_another_kind_is_named(data: bytes, kind: str, tmp_path):
    with raises(ImageError, kind, code="image_unknown"):
        decode_image(data)
    if kind in ("BMP", "JPEG 2000", "AVIF"):
        (tmp_path / "a.bin").write_bytes(data)
        with raises(SlideFormatError, "a.bin", kind):
            open_reader(tmp_path / "a.bin")


def test_a_jpeg_of_12_bits_is_refused_for_its_depth():
    data = bytearray(saved("JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    with raises(ImageError, "12 bits", code="image_depth"):
        decode_image(bytes(data))


def test_a_jpeg_with_previews_behind_it_states_its_mpp():
    preview = Image.fromarray(tissue_pixels(12, 16))
    data = saved("MPO", save_all=True, append_images=[preview], dpi=(50_800, 50_800))
    picture = decode_picture(data)
    assert (picture.mpp, picture.mpp_source) == (pytest.approx(0.5), "JPEG density")
    assert np.abs(picture.pixels.astype(int) - tissue_pixels(24, 32)).mean() < 5
