import json
from pathlib import Path

import numpy as np
from PIL import Image

from export.errors import InputError, SettingsError
from export.gate.tiles import validation_tiles
from tests.support.errors import raises
from tests.support.toy_bundle import CLASSES

NAMES = [entry.name for entry in CLASSES]


def test_held_out_tiles_come_first_and_the_source_says_so(toy_data: Path) -> None:
    tiles = validation_tiles(toy_data, 64, 3, class_names=NAMES)
    assert tiles.names == ("tile10", "tile11", "tile8")
    assert tiles.source == "2 test, 1 validation tiles of data"


def _write_masks(root: Path, labels: dict[str, tuple[int, list[int]]]) -> Path:
    """A data set of tiles, each with its fold and the labels that it has, the first the most."""
    (root / "img").mkdir(parents=True)
    (root / "mask").mkdir()
    for name, (_, found) in labels.items():
        mask = np.full((8, 8), found[0], np.uint8)
        mask[0, : len(found)] = found
        Image.fromarray(mask).save(root / "mask" / f"{name}.png")
        Image.fromarray(np.stack([mask] * 3, axis=-1)).save(root / "img" / f"{name}.png")
    rows = "".join(f"{name},{fold}\n" for name, (fold, _) in labels.items())
    (root / "folds.csv").write_text(f"img_id,fold\n{rows}")
    classes = [{"name": entry.name, "color": entry.color} for entry in CLASSES]
    (root / "dataset.json").write_text(json.dumps({"classes": classes}))
    return root


def test_every_class_is_on_a_tile_where_the_data_has_it(tmp_path: Path) -> None:
    labels = {
        "a": (-1, [1, 2]),
        "b": (-1, [1, 2]),
        "c": (-1, [1, 2, 4]),
        "d": (0, [1]),
        "e": (0, [2, 3]),
        "f": (1, [3, 5]),
        "g": (1, [5, 1]),
    }
    data = _write_masks(tmp_path / "data", labels)
    assert validation_tiles(data, 64, 4).names == ("a", "c", "e", "g")
    assert validation_tiles(data, 64, 4).source == "2 test, 1 validation, 1 training tiles of data"
    assert validation_tiles(data, 64, 1).names == ("c",)  # the rarest class
    assert validation_tiles(data, 64, 7).names == tuple("abcdefg")


def test_masks_of_later_splits_are_not_read_where_earlier_ones_have_all_classes(
    tmp_path: Path,
) -> None:
    data = _write_masks(tmp_path / "data", {"a": (-1, [1, 2, 3, 4, 5]), "b": (1, [1])})
    (data / "mask" / "b.png").write_bytes(b"no picture")
    assert validation_tiles(data, 64, 1).names == ("a",)


def test_images_and_masks_are_those_on_disk(toy_data: Path) -> None:
    tiles = validation_tiles(toy_data, 64, 1, class_names=NAMES)
    assert tiles.masks is not None
    (name,) = tiles.names
    for kind, pixels in (("img", tiles.images[0]), ("mask", tiles.masks[0])):
        np.testing.assert_array_equal(pixels, Image.open(toy_data / kind / f"{name}.png"))


def test_tiles_of_another_size_are_resized_as_in_the_evaluation(toy_data: Path) -> None:
    tiles = validation_tiles(toy_data, 32, 1, class_names=NAMES)
    assert tiles.images.shape == (1, 32, 32, 3)
    assert tiles.masks is not None
    assert tiles.masks.shape == (1, 32, 32)


def test_a_data_set_of_other_classes_is_refused(toy_data: Path) -> None:
    with raises(InputError, "Tumor", "Gland, Other"):
        validation_tiles(toy_data, 64, 1, class_names=["Gland", "Other"])


def test_drawn_tissue_has_masks_only_for_its_own_classes() -> None:
    drawn = ["Tumor", "Stroma", "Inflammatory", "Necrosis", "Other"]
    assert validation_tiles(None, 64, 1, class_names=drawn).masks is not None
    assert validation_tiles(None, 64, 1, class_names=["Gland", "Other"]).masks is None


def test_drawn_tissue_is_the_same_each_time() -> None:
    first, again = (validation_tiles(None, 64, 2) for _ in range(2))
    np.testing.assert_array_equal(first.images, again.images)


def test_no_tile_at_all_is_refused() -> None:
    with raises(SettingsError, "0 tiles"):
        validation_tiles(None, 64, 0)
