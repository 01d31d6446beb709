"""Images of any size and um per pixel, as a model of one tile size sees them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from serve.images.mpp import PixelSize
from tests.support.errors import raises
from tests.support.pictures import blobs
from train.data.folder import Tile
from train.data.scale import TileScale, cut_image, cut_labels, nearest, resolve_mpp
from train.errors import ScaleError

SCALE = TileScale(tile_size_px=64, mpp=0.5)


def tile(mpp: float | None) -> Tile:
    return Tile(f"at_{mpp}", Path("image"), Path("mask"), mpp)


def test_an_image_of_the_tiles_size_and_scale_is_seen_as_it_is():
    image = blobs(64, 64)
    placement = SCALE.place(64, 64, 0.5)
    np.testing.assert_array_equal(cut_image(image, placement, SCALE), image[None])
    assert placement.own_pixels


def test_an_oblong_image_is_cut_and_not_squeezed():
    image = blobs(64, 150)
    placement = SCALE.place(64, 150, 0.5)
    tiles = cut_image(image, placement, SCALE)
    assert placement.places[0] == (0, 0)
    for (y, x), pixels in zip(placement.places, tiles, strict=True):
        seen = image[y : y + 64, x : x + 64]
        np.testing.assert_array_equal(pixels[:, : seen.shape[1]], seen)


def test_padding_is_unlabelled():
    placement = SCALE.place(40, 64, 0.5)
    labels = cut_labels(np.full((40, 64), 2, np.uint8), placement, SCALE)
    assert (labels[0, :40] == 2).all()
    assert (labels[0, 40:] == 0).all()


@pytest.mark.parametrize(("mpp", "side"), [(0.25, 128), (1.0, 32), (0.505, 64)])
def test_the_same_tissue_at_another_scale_is_the_same_tile(mpp: float, side: int):
    placement = SCALE.place(side, side, mpp)
    assert placement.size == (64, 64)
    assert placement.own_pixels == (side == 64)
    labels = np.zeros((side, side), np.uint8)
    labels[: side // 2] = 1
    (seen,) = cut_labels(labels, placement, SCALE)
    np.testing.assert_array_equal(seen[:32], 1)
    np.testing.assert_array_equal(seen[32:], 0)


def test_a_label_is_that_of_the_pixel_that_holds_its_centre():
    labels = np.arange(6, dtype=np.uint8)[None].repeat(3, axis=0)
    assert nearest(labels, 1, 2).tolist() == [[1, 4]]
    assert nearest(labels.T, 2, 1).tolist() == [[1], [4]]


def test_the_settings_scale_comes_before_the_data_sets():
    assert resolve_mpp(1.0, 0.5, [tile(0.5)]) == 1.0
    assert resolve_mpp(None, 0.5, [tile(0.5), tile(0.25)]) == 0.5
    assert resolve_mpp(None, None, [tile(None)]) is None


@pytest.mark.parametrize("sides", [None, PixelSize(2.1, 0.5)])
def test_an_image_that_serving_would_refuse_as_too_coarse_is_refused(sides: PixelSize | None):
    assert resolve_mpp(0.5, None, [tile(2.0)]) == 0.5
    coarse = replace(tile(2.1), sides=sides)
    with raises(ScaleError, "4.2 times"):
        resolve_mpp(None, 0.5, [tile(0.5), coarse])


@pytest.mark.parametrize(
    ("wanted", "mpps", "named"),
    [
        (0.5, [None, 0.5], ("1 images", "at_None")),
        (None, [None, 0.5], ("1 images", "at_None")),
        (None, [0.25, 0.5], ("--mpp",)),
    ],
)
def test_a_scale_that_is_not_known_is_never_guessed(
    wanted: float | None, mpps: list[float | None], named: tuple[str, ...]
):
    with raises(ScaleError, *named):
        resolve_mpp(wanted, None, [tile(mpp) for mpp in mpps])
