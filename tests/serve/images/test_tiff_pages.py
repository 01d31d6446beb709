"""TIFFs whose tags are unusual or wrong: the right pixels, or a refusal that names the tag."""

import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from serve.contract.errors import ImageError
from serve.images.decode import decode_picture
from tests.support.errors import raises
from tests.support.pictures import blobs
from tests.support.raw_tiff import RawPage, raw_page, raw_tiff
from train.data.mask_files import open_mask, palette_of

IMAGE = blobs(48, 64)
GREY = np.ascontiguousarray(IMAGE[..., 0])
SMALL = np.ascontiguousarray(IMAGE[::4, ::4])
LARGE = np.tile(IMAGE, (2, 2, 1))
ALPHA = np.full(GREY.shape, 255, np.uint8)
ALPHA[:10], ALPHA[10:20] = 0, 128
PALETTE = np.random.default_rng(0).integers(0, 256, (256, 3))
YCBCR, PALETTE_COLOR, CMYK = 6, 3, 5


def pixels_of(*pages: RawPage) -> NDArray[np.uint8]:
    return decode_picture(raw_tiff(*pages)).pixels


@pytest.mark.parametrize(
    "page",
    [
        raw_page(SMALL, t254=1, below=[raw_page(IMAGE)]),
        raw_page(SMALL, below=[raw_page(SMALL, t254=1), raw_page(IMAGE)]),
        raw_page(IMAGE, below=[raw_page(SMALL)]),
        raw_page(IMAGE, below=[raw_page(LARGE, t254=1)]),
        raw_page(IMAGE, t330=10**8),
        raw_page(IMAGE, t330=[8, 9, 10]),
    ],
    ids=["below", "second below", "pyramid", "thumbnail below", "beyond", "nonsense"],
)
def test_the_image_may_be_in_a_sub_folder(page: RawPage) -> None:
    assert np.array_equal(pixels_of(page), IMAGE)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("scale", [1, 257])
def test_a_palette_may_have_colours_of_8_or_16_bits(
    bits: int, compression: int, scale: int, tmp_path: Any
) -> None:
    indices = GREY >> (8 - bits)
    colors = PALETTE[: 2**bits]
    planes = np.unpackbits(indices[..., None], axis=-1)[..., 8 - bits :]
    packed = np.packbits(planes.reshape(len(indices), -1), axis=1).tobytes()
    content = raw_tiff(
        raw_page(
            GREY, t258=bits, t259=compression, t262=PALETTE_COLOR,
            t320=(colors.T.ravel() * scale).tolist(),
            segments=[packed if compression == 1 else zlib.compress(packed)],
        )
    )  # fmt: skip
    assert np.array_equal(decode_picture(content).pixels, colors[indices])
    (tmp_path / "mask.tif").write_bytes(content)
    assert np.array_equal(palette_of(open_mask(tmp_path / "mask.tif"))[: 2**bits], colors)


def test_grey_that_was_multiplied_by_its_alpha_is_composited() -> None:
    grey = np.round(GREY * (ALPHA / 255)).astype(np.uint8)
    found = pixels_of(raw_page(np.dstack([grey, ALPHA]), t262=1, t338=1))
    expected = np.round(GREY * (ALPHA / 255) + 255 - ALPHA)
    assert np.abs(found - expected[..., None]).max() <= 2


PARTS = [IMAGE[row : row + 16].tobytes() for row in (0, 16, 32)]
TILES = [
    np.ascontiguousarray(IMAGE[row : row + 16, column : column + 32]).tobytes()
    for row in (0, 16, 32)
    for column in (0, 32)
]


@pytest.mark.parametrize(
    "page",
    [
        raw_page(IMAGE, t278=16, segments=PARTS[:2]),
        raw_page(IMAGE, t278=16, t259=8, segments=[zlib.compress(part) for part in PARTS[:2]]),
        raw_page(IMAGE, t278=16, t273=[8, 0, 6152], segments=PARTS),
        raw_page(IMAGE, t322=32, t323=16, segments=TILES[:5]),
        raw_page(IMAGE, t322=32, t323=16, segments=[*TILES[:2], b"", *TILES[3:]]),
        raw_page(IMAGE, t284=2, segments=[IMAGE[..., 0].tobytes(), IMAGE[..., 1].tobytes()]),
        raw_page(IMAGE, t259=8, segments=[zlib.compress(PARTS[0])]),
    ],
    ids=["strip", "deflate strip", "no place", "tile", "empty tile", "plane", "rows"],
)
def test_missing_strips_tiles_and_planes_are_not_taken_for_black(page: RawPage) -> None:
    with raises(ImageError, code="image_damaged"):
        pixels_of(page)


def test_whole_strips_tiles_and_planes_are_read() -> None:
    planes = [np.ascontiguousarray(IMAGE[..., color]).tobytes() for color in range(3)]
    for page in (
        raw_page(IMAGE, t278=16, segments=PARTS),
        raw_page(IMAGE, t322=32, t323=16, t278=None, segments=TILES),
        raw_page(IMAGE, t284=2, segments=planes),
        raw_page(IMAGE, t278=2**32 - 1),
        raw_page(IMAGE, t279=None),
        raw_page(IMAGE, t279=0),
    ):
        assert np.array_equal(pixels_of(page), IMAGE)


@pytest.mark.parametrize(
    ("page", "code", "found"),
    [
        (raw_page(GREY, t262=None), "image_colors", "PhotometricInterpretation is missing"),
        (raw_page(IMAGE, t262=None), "image_colors", "PhotometricInterpretation is missing"),
        (raw_page(IMAGE, t258=[4, 4, 4]), "image_colors", "3 channels of 4 bits"),
        (raw_page(IMAGE, t258=[5, 6, 5]), "image_colors", "3 channels of 6 bits"),
        (raw_page(IMAGE, t339=[1, 1, 2]), "image_depth", "signed"),
        (raw_page(IMAGE, t262=YCBCR, t530=[2, 2]), "image_colors", "subsampled 2 x 2"),
        (raw_page(IMAGE, t262=YCBCR), "image_colors", "subsampled 2 x 2"),
        (
            raw_page(IMAGE, t262=YCBCR, t530=[1, 1], t284=2, segments=[GREY.tobytes()] * 3),
            "image_colors",
            "in planes (YCbCr)",
        ),
        (
            raw_page(np.dstack([IMAGE, ALPHA]), t338=1, t284=2, segments=[GREY.tobytes()] * 4),
            "image_colors",
            "4 channels of 8 bits in planes",
        ),
        (raw_page(np.dstack([IMAGE, ALPHA]), t262=CMYK, t332=2), "image_colors", "InkSet 2"),
    ],
)
def test_a_layout_that_is_not_read_is_named(page: RawPage, code: str, found: str) -> None:
    with raises(ImageError, found, code=code):
        pixels_of(page)
