"""Masks in the forms that people have: the right labels, or a refusal that names what was found."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.support.errors import raises
from tests.support.pictures import png_chunk
from tests.support.raw_tiff import raw_page, raw_tiff
from train.data.masks import MaskCode, mask_code, mask_values, read_mask
from train.errors import MaskError

LABELS = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 1, 2]], np.uint8)
NAMES, COLORS = ("Tumor", "Stroma", "Fat"), ("#d55e00", "#009e73", "#ffff00")
RGB = np.array([[0, 0, 0], [0xD5, 0x5E, 0], [0, 0x9E, 0x73], [255, 255, 0]], np.uint8)
CODE = mask_code(NAMES, COLORS)


def saved(path: Path, pixels: Any, suffix: str = ".png", **options: Any) -> Path:
    path = path / f"mask{suffix}"
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def palette(indices: np.ndarray, colors: np.ndarray) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette(colors.astype(np.uint8).ravel().tolist())
    return image


def labels(path: Path, code: MaskCode = CODE) -> list[list[int]]:
    found = read_mask(path, code.num_classes, code)
    assert found.dtype == np.uint8
    return found.tolist()


ALPHA = np.full(LABELS.shape, 255, np.uint8)
REORDERED = np.array([2, 0, 3, 1])  # index of each label in a palette that was optimised
FORMS: dict[str, Any] = {
    "8 bits": LABELS,
    "16 bits": LABELS.astype(np.uint16),
    "grey as RGB": np.dstack([LABELS] * 3),
    "colours": RGB[LABELS],
    "colours with alpha": np.dstack([RGB[LABELS], ALPHA]),
    "labels with alpha": np.dstack([LABELS, ALPHA]),
    "palette of any colours": palette(LABELS, np.arange(12).reshape(4, 3) + 40),
    "palette of the classes": palette(LABELS, RGB),
    "palette of greys": palette(LABELS, np.arange(4).repeat(3).reshape(4, 3)),
    "palette that is black": palette(LABELS, np.zeros((4, 3))),
    "palette of equal greys": palette(LABELS, np.array([0, 255, 255, 255]).repeat(3).reshape(4, 3)),
    "palette of few colours": palette(LABELS, np.vstack([RGB[:2], RGB[:1], RGB[:1]])),
    "palette of greys in another order": palette(
        REORDERED[LABELS], np.argsort(REORDERED).repeat(3).reshape(4, 3)
    ),
    "palette in another order": palette(REORDERED[LABELS], RGB[np.argsort(REORDERED)]),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_means_the_same_labels_in_every_form(form: str, tmp_path: Path) -> None:
    assert labels(saved(tmp_path, FORMS[form])) == LABELS.tolist()


@pytest.mark.parametrize("first", [RGB, np.arange(4).repeat(3).reshape(4, 3)])
def test_a_value_beyond_the_palette_is_not_black(first: np.ndarray, tmp_path: Path) -> None:
    pixels = np.where(LABELS == 0, np.uint8(200), LABELS)
    colors = np.vstack([first, np.full((17, 3), 77)])  # 21, so that values are stored in 8 bits
    with raises(MaskError, "label 200"):
        labels(saved(tmp_path, palette(pixels, colors)))


def test_values_that_were_cut_off_with_their_colours_are_refused(tmp_path: Path) -> None:
    with raises(MaskError, "mask.png", "palette"):
        labels(saved(tmp_path, palette(LABELS, RGB[:1])))


def packed_png(values: np.ndarray, bits: int) -> bytes:
    """A grey PNG of fewer than 8 bits, which Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    height, width = values.shape
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    places = (values[..., None] >> np.arange(bits)[::-1] & 1).reshape(height, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(places, axis=1))
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_of_few_bits_are_labels_too(bits: int, tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    path.write_bytes(packed_png(LABELS, bits))
    assert labels(path) == LABELS.tolist()
    assert mask_values(path) == {0, 1, 2, 3}


def test_a_mask_of_far_too_many_pixels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    path.write_bytes(packed_png(LABELS, 8).replace(struct.pack(">II", 4, 3), b"\0\0\xff\xff" * 2))
    with raises(MaskError, path):
        read_mask(path, 3, CODE)


@pytest.mark.parametrize("suffix", [".tif", ".TIFF", ".bmp", ".gif", ".PNG"])
def test_a_mask_may_have_another_format(suffix: str, tmp_path: Path) -> None:
    assert labels(saved(tmp_path, LABELS, suffix)) == LABELS.tolist()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("is_big", [False, True])
def test_a_deep_tiff_is_read_in_both_byte_orders(
    byteorder: str, is_big: bool, dtype: type, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"byteorder": byteorder, "bigtiff": is_big}
    tifffile.imwrite(tmp_path / "mask.tif", LABELS.astype(dtype), **options)
    assert labels(tmp_path / "mask.tif") == LABELS.tolist()


def test_a_mask_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert labels(saved(tmp_path, LABELS, exif=exif)) == np.rot90(LABELS, -1).tolist()


@pytest.mark.parametrize(
    ("dtype", "ignored"), [(np.uint8, 255), (np.uint16, 255), (np.uint16, 65535)]
)
def test_255_is_unlabelled(dtype: type, ignored: int, tmp_path: Path) -> None:
    mask = np.array([[1, ignored, 2]], dtype)
    assert labels(saved(tmp_path, mask)) == [[1, 0, 2]]


def test_transparent_pixels_are_unlabelled(tmp_path: Path) -> None:
    alpha = ALPHA.copy()
    alpha[0, 1] = 0
    expected = LABELS.copy()
    expected[0, 1] = 0
    assert labels(saved(tmp_path, np.dstack([RGB[LABELS], alpha]))) == expected.tolist()


@pytest.mark.parametrize("form", ["value", "colour", "index", "alpha of indices"])
def test_what_a_file_calls_transparent_is_unlabelled(form: str, tmp_path: Path) -> None:
    pixels, key = {
        "value": (LABELS, 1),
        "colour": (RGB[LABELS], tuple(RGB[1].tolist())),
        "index": (palette(LABELS, RGB), 1),
        "alpha of indices": (palette(LABELS, RGB), b"\xff\0\xff"),
    }[form]
    expected = np.where(LABELS == 1, 0, LABELS)
    assert labels(saved(tmp_path, pixels, transparency=key)) == expected.tolist()


@pytest.mark.parametrize("suffix", [".gif", ".png"])
def test_labels_do_not_depend_on_which_of_them_a_compressed_mask_has(
    suffix: str, tmp_path: Path
) -> None:
    """GIF writers leave out unused colours, as do programs that make PNG files smaller."""
    some = np.array([[2, 2, 3], [3, 255, 2]], np.uint8)
    values, indices = np.unique(some, return_inverse=True)
    small = palette(indices.reshape(some.shape), values.repeat(3).reshape(-1, 3))
    path = saved(tmp_path, some if suffix == ".gif" else small, suffix)
    assert labels(path) == [[2, 2, 3], [3, 0, 2]]
    assert mask_values(path) == {2, 3, 255}


@pytest.mark.parametrize("num_channels", [3, 4])
def test_a_mask_of_several_deep_channels_is_refused(num_channels: int, tmp_path: Path) -> None:
    """Pillow keeps the upper 8 bits, which are 0 for small labels."""
    path = tmp_path / "mask.tif"
    deep = np.dstack([LABELS.astype(np.uint16)] * num_channels)
    tifffile.imwrite(path, deep, photometric="rgb", extrasamples=["unassalpha"][: num_channels - 3])
    with raises(MaskError, path, "16 bits"):
        read_mask(path, 3, CODE)


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        (".png", {"format": "JPEG"}),
        (".png", {"format": "WEBP"}),
        (".tif", {"compression": "jpeg"}),
    ],
)
def test_a_mask_that_is_lossy_inside_is_refused_whatever_it_is_called(
    suffix: str, options: dict[str, str], tmp_path: Path
) -> None:
    path = saved(tmp_path, LABELS, suffix, **options)
    with raises(MaskError, path, "lossless"):
        read_mask(path, 3, CODE)


BOTH = {"0": "Tumor", "1": "Stroma"}
COLOR_TABLE = {"#ffffff": None, "#000000": "Fat", "#FF0000": "Tumor"}
SOME_COLORS = np.array([[[255] * 3, [0] * 3, [255, 0, 0]]], np.uint8)
BLACK_AND_WHITE = palette(np.array([[0, 1]]), np.array([[0] * 3, [255] * 3]))


@pytest.mark.parametrize(
    ("tables", "pixels", "expected"),
    [
        (
            {"mask_values": {"0": "Tumor", "7": "Stroma", "9": None}},
            np.array([[0, 7, 9, 255]], np.uint8),
            [[1, 2, 0, 0]],
        ),
        (
            {"mask_values": {"0": "Tumor", "255": "Stroma"}},
            np.array([[0, 255]], np.uint8),
            [[1, 2]],
        ),
        ({"mask_values": BOTH}, np.array([[False, True]]), [[1, 2]]),
        ({"mask_values": BOTH}, BLACK_AND_WHITE, [[1, 2]]),  # a table of indices
        ({"mask_colors": COLOR_TABLE}, SOME_COLORS, [[0, 3, 1]]),
    ],
    ids=["values", "0 and 255", "two levels", "indices", "colours"],
)
def test_values_indices_and_colours_may_have_a_table(
    tables: dict[str, Any], pixels: Any, expected: list[list[int]], tmp_path: Path
) -> None:
    assert labels(saved(tmp_path, pixels), mask_code(NAMES, COLORS, **tables)) == expected


@pytest.mark.parametrize(
    ("pixels", "found"),
    [
        (np.array([[4]], np.uint8), "label 4"),
        (np.array([[-1]], np.int32), "label -1"),
        (np.array([[70_000]], np.int32), "label 70000"),
        (np.array([[[1, 2, 3]]], np.uint8), "#010203"),
        (np.dstack([LABELS, ALPHA // 2]), "half transparent"),
        (LABELS.astype(np.float32), "mode F"),
        (Image.new("CMYK", (4, 4)), "mode CMYK"),
        (palette(np.array([[9]]), np.full((10, 3), [77, 0, 0])), "label 9"),
    ],
)
def test_what_means_no_class_is_refused_by_name(pixels: Any, found: str, tmp_path: Path) -> None:
    with raises(MaskError, found):
        labels(saved(tmp_path, pixels, ".tif"))


def test_smoothed_colours_are_told_by_their_number(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(1, 255, (20, 20, 3)).astype(np.uint8)
    with raises(MaskError, "400 colours", "smoothing"):
        labels(saved(tmp_path, pixels))


def short_png() -> bytes:
    """A row of four pixels, where the header says three rows."""
    header = struct.pack(">IIBBBBB", 4, 3, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0\1\1\1\1")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, content) for kind, content in chunks)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        b"\x89PNG\r\n\x1a\n",
        short_png(),
        raw_tiff(raw_page(LABELS, t278=2, segments=[LABELS[:2].tobytes()])),
        raw_tiff(raw_page(LABELS, t262=None)),
    ],
    ids=["empty", "text", "head", "rows", "strips", "colours"],
)
def test_a_damaged_mask_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_bytes(content)
    with raises(MaskError, "mask.png"):
        labels(tmp_path / "mask.png")


@pytest.mark.parametrize(
    ("tables", "found"),
    [
        ({"mask_colors": {"red": "Tumor"}}, "'red'"),
        ({"mask_colors": {"#ff0000": "Bone"}}, "'Bone'"),
        ({"mask_values": {"one": "Tumor"}}, "'one'"),
        ({"mask_values": {"-1": "Tumor"}}, "'-1'"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(tables: dict[str, Any], found: str) -> None:
    with raises(ValueError, found):
        mask_code(NAMES, COLORS, **tables)
