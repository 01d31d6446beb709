"""Samples cut from images of any size."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from serve.images.mpp import PixelSize
from tests.support.toy_bundle import REFERENCE_RGB
from tests.support.toy_data import TILE_SIZE_PX, write_twice_as_large
from train.data.dataset import TileDataset
from train.data.folder import read_tile_folder
from train.data.images import image_size
from train.data.scale import TileScale
from train.settings import AugmentationSettings

SCALE = TileScale(tile_size_px=TILE_SIZE_PX, mpp=0.5)


@pytest.fixture
def augmented(toy_data: Path) -> TileDataset:
    tiles = read_tile_folder(toy_data).tiles["training"]
    return TileDataset(tiles, 5, SCALE, AugmentationSettings(), seed=1)


def test_augmentation_depends_on_epoch_and_index_only(augmented: TileDataset):
    first = augmented[(3, 2)]["image"]
    torch.rand(10)
    assert torch.equal(augmented[(3, 2)]["image"], first)
    assert not torch.equal(augmented[(4, 2)]["image"], first)


def test_a_tile_that_an_epoch_shows_again_is_augmented_anew(augmented: TileDataset):
    copies = [augmented[(3, 2, copy)] for copy in range(6)]
    assert torch.equal(copies[0]["image"], augmented[(3, 2)]["image"])
    pictures = {sample["image"].numpy().tobytes() for sample in copies}
    assert len(pictures) == 6
    assert torch.equal(copies[4]["image"], augmented[(3, 2, 4)]["image"])
    views = [augmented.view(3, 2, copy) for copy in range(200)]
    assert set(views) == set(range(8))


def test_augmentation_leaves_the_global_random_state_alone(augmented: TileDataset):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    augmented[(0, 0)]
    assert torch.equal(torch.rand(3), expected)


def test_dihedral_augmentation_moves_pixels_and_labels_together(toy_data: Path):
    tiles = read_tile_folder(toy_data).tiles["training"]
    settings = AugmentationSettings(augment="dihedral")
    dataset = TileDataset(tiles, 5, SCALE, settings)
    plain = TileDataset(tiles, 5, SCALE)[0]
    views = [dataset[(epoch, 0)] for epoch in range(12)]
    assert len({view["labels"].numpy().tobytes() for view in views}) > 2
    for view in views:
        for label in range(6):
            expected = plain["image"][:, plain["labels"] == label].float().mean(dim=1)
            found = view["image"][:, view["labels"] == label].float().mean(dim=1)
            torch.testing.assert_close(found, expected)


@pytest.fixture
def large_data(toy_data: Path, tmp_path: Path) -> Path:
    """The toy data set at half the um per pixel, and one image of 3 x 2 tiles."""
    data = Path(shutil.copytree(toy_data, tmp_path / "data"))
    write_twice_as_large(data)
    for folder in ("img", "mask"):
        path = data / folder / "tile0.png"
        with Image.open(path) as image:
            pixels = np.asarray(image)
        repeats = (2, 3) + (1,) * (pixels.ndim - 2)
        Image.fromarray(np.tile(pixels, repeats)).save(path)
    return data


@pytest.mark.parametrize("augment", ["full", "dihedral"])
def test_an_image_gives_as_many_crops_as_its_area_holds(large_data: Path, augment: str):
    tiles = read_tile_folder(large_data).tiles["training"]
    dataset = TileDataset(tiles, 5, SCALE, AugmentationSettings(augment=augment))
    assert len(dataset) == 6 + len(tiles) - 1
    crops = [dataset[(0, index)] for index in range(6)]
    assert {crop["tile_id"] for crop in crops} == {"tile0"}
    assert len({crop["labels"].numpy().tobytes() for crop in crops}) > 1


def test_a_crop_keeps_pixels_and_labels_together_at_any_scale(large_data: Path):
    tiles = read_tile_folder(large_data).tiles["training"]
    settings = AugmentationSettings(augment="full", color_jitter=0)
    dataset = TileDataset(tiles, 5, SCALE, settings)
    for epoch in range(4):
        sample = dataset[(epoch, 3)]
        for label in range(1, 6):
            pixels = sample["image"][:, sample["labels"] == label].float()
            if pixels.shape[1] < 200:
                continue
            color = torch.tensor(REFERENCE_RGB[label - 1]).float()
            assert (pixels.median(dim=1).values - color).abs().max() < 15


def test_an_image_smaller_than_the_tile_is_padded_without_labels(large_data: Path):
    tiles = read_tile_folder(large_data).tiles["training"][1:2]
    coarse = TileScale(tile_size_px=TILE_SIZE_PX, mpp=1.0)  # the image is 32 pixels of 1 um
    sample = TileDataset(tiles, 5, coarse, AugmentationSettings(augment="dihedral"))[0]
    assert sample["image"].shape == (3, TILE_SIZE_PX, TILE_SIZE_PX)
    assert (sample["labels"] > 0).float().mean() <= 0.25


def test_pixels_that_are_not_square_are_resampled_along_each_axis(large_data: Path):
    tile = read_tile_folder(large_data).tiles["training"][1]
    height, width = image_size(tile.image)
    flat = replace(tile, mpp=0.5**0.5 * 0.5, sides=PixelSize(0.25, 0.5))
    dataset = TileDataset([flat], 5, SCALE)
    assert dataset.placements[0].size == (height, round(width / 2))
    sample = TileDataset([flat], 5, SCALE, AugmentationSettings(augment="dihedral"))[0]
    assert sample["image"].shape == (3, TILE_SIZE_PX, TILE_SIZE_PX)


@pytest.mark.parametrize("sides", [PixelSize(0.25, 0.5), PixelSize(0.5, 0.25)])
def test_a_crop_of_pixels_that_are_not_square_shows_a_square_of_tissue(
    sides: PixelSize, large_data: Path, tmp_path: Path
):
    rows, columns = np.mgrid[:160, :160]
    picture, mask = tmp_path / "image.png", tmp_path / "mask.png"
    colors = np.stack([columns, rows, rows], axis=-1).astype(np.uint8)
    Image.fromarray(colors).save(picture)
    Image.fromarray(np.ones((160, 160), np.uint8)).save(mask)
    tile = read_tile_folder(large_data).tiles["training"][1]
    tile = replace(tile, image=picture, mask=mask, mpp=sides.mean, sides=sides)
    sample = TileDataset([tile], 5, SCALE, AugmentationSettings(augment="dihedral"))[0]
    extent = (sample["image"].amax((1, 2)) - sample["image"].amin((1, 2))).tolist()
    shown_um = (extent[0] * sides.x, extent[1] * sides.y)
    assert shown_um == pytest.approx([TILE_SIZE_PX * 0.5] * 2, abs=2)
