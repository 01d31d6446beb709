from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.validation import validation_tiles
from tests.toy_bundle import CLASSES
from train.errors import FocalPathError

NAMES = [entry.name for entry in CLASSES]


def test_held_out_tiles_come_first_and_the_source_says_so(toy_data: Path) -> None:
    tiles = validation_tiles(toy_data, 64, 3, class_names=NAMES)
    assert tiles.names == ("tile10", "tile11", "tile8")
    assert tiles.source == "2 test, 1 validation tiles of data"


def test_images_and_masks_are_those_on_disk(toy_data: Path) -> None:
    tiles = validation_tiles(toy_data, 64, 1, class_names=NAMES)
    assert tiles.masks is not None
    for kind, pixels in (("img", tiles.images[0]), ("mask", tiles.masks[0])):
        np.testing.assert_array_equal(pixels, Image.open(toy_data / kind / "tile10.png"))


def test_tiles_of_another_size_are_resized_as_in_the_evaluation(toy_data: Path) -> None:
    tiles = validation_tiles(toy_data, 32, 1, class_names=NAMES)
    assert tiles.images.shape == (1, 32, 32, 3)
    assert tiles.masks is not None
    assert tiles.masks.shape == (1, 32, 32)


def test_a_data_set_of_other_classes_is_refused(toy_data: Path) -> None:
    with pytest.raises(FocalPathError, match="has the classes Tumor.*; the model has Gland, Other"):
        validation_tiles(toy_data, 64, 1, class_names=["Gland", "Other"])


def test_drawn_tissue_has_masks_only_for_its_own_classes() -> None:
    drawn = ["Tumor", "Stroma", "Inflammatory", "Necrosis", "Other"]
    assert validation_tiles(None, 64, 1, class_names=drawn).masks is not None
    assert validation_tiles(None, 64, 1, class_names=["Gland", "Other"]).masks is None


def test_drawn_tissue_is_the_same_each_time() -> None:
    first, again = (validation_tiles(None, 64, 2) for _ in range(2))
    np.testing.assert_array_equal(first.images, again.images)


def test_no_tile_at_all_is_refused() -> None:
    with pytest.raises(FocalPathError, match="0 tiles to compare on"):
        validation_tiles(None, 64, 0)
