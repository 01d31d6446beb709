import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.errors import raises
from tests.support.toy_data import TILE_SIZE_PX, write_toy_data
from train.data.folder import read_tile_folder
from train.data.pixels import class_frequencies, count_each
from train.errors import DatasetError, ImageFileError, MaskError


@pytest.fixture
def data(toy_data: Path, tmp_path: Path) -> Path:
    """A copy of the toy data set that a test may damage."""
    return Path(shutil.copytree(toy_data, tmp_path / "data"))


def test_folds_become_splits(toy_data: Path):
    folder = read_tile_folder(toy_data)
    assert {split: len(tiles) for split, tiles in folder.tiles.items()} == {
        "training": 8,
        "validation": 2,
        "test": 2,
    }
    assert folder.mpp == 0.5
    assert folder.classes[0].name == "Tumor"


def test_frequencies_are_shares_of_labelled_training_pixels(toy_data: Path):
    folder = read_tile_folder(toy_data)
    masks = [np.asarray(Image.open(tile.mask)) for tile in folder.tiles["training"]]
    counts = np.bincount(np.concatenate(masks).ravel(), minlength=6)[1:]
    np.testing.assert_allclose(class_frequencies(folder), counts / counts.sum(), rtol=1e-6)


def test_frequencies_are_shares_of_area_where_um_per_pixel_differ(data: Path):
    folder = read_tile_folder(data)
    first, *others = folder.tiles["training"]
    coarser = replace(folder, tiles={"training": (replace(first, mpp=1.0), *others)})
    counts = [
        np.bincount(np.asarray(Image.open(tile.mask)).ravel(), minlength=6)[1:]
        for tile in folder.tiles["training"]
    ]
    areas = 4 * counts[0] + sum(counts[1:])  # at 0.5 um, a pixel of 1 um is four
    np.testing.assert_allclose(class_frequencies(coarser), areas / areas.sum(), rtol=1e-6)


def test_jpeg_images_are_found(data: Path):
    Image.open(data / "img" / "tile0.png").save(data / "img" / "tile0.jpg")
    (data / "img" / "tile0.png").unlink()
    assert read_tile_folder(data).tiles["training"][0].image.suffix == ".jpg"


def test_files_saved_by_a_spreadsheet_are_read(data: Path):
    for name in ("folds.csv", "dataset.json"):
        path = data / name
        path.write_text(path.read_text(), encoding="utf-8-sig", newline="\r\n")
    assert len(read_tile_folder(data).tiles["training"]) == 8


def test_folds_may_have_empty_rows_decimal_points_and_decimal_commas(data: Path):
    path = data / "folds.csv"
    lines = path.read_text().splitlines()[1:]
    rows = [f"{line.replace(',', ';')}.0; P1;0,5" for line in lines]
    path.write_text("\r\n".join(["img_id;fold;group;mpp", *rows, ";;;", ""]), "utf-16")
    found = read_tile_folder(data).tiles
    assert [len(found[split]) for split in ("training", "validation", "test")] == [8, 2, 2]
    assert {(tile.mpp, tile.group) for tile in found["training"]} == {(0.5, "P1")}


@pytest.mark.parametrize(
    ("file", "old", "new", "meant"),
    [
        ("folds.csv", "img_id,fold", "img_id,fold,MPP", "mpp"),
        ("folds.csv", "img_id,fold", "img_id,fold,groups", "group"),
        ("dataset.json", '"mpp"', '"mask_value": {}, "mpp"', "mask_values"),
        ("dataset.json", '"mpp"', '"Mask_Orientation": "stored", "mpp"', "mask_orientation"),
    ],
)
def test_a_misspelt_name_is_told_and_not_ignored(
    data: Path, file: str, old: str, new: str, meant: str
):
    path = data / file
    path.write_text(path.read_text().replace(old, new))
    with raises(DatasetError, path, f"Is '{meant}' meant"):
        read_tile_folder(data)


def test_other_names_are_the_users_own(data: Path):
    (data / "folds.csv").write_text(
        (data / "folds.csv").read_text().replace("img_id,fold", "img_id,fold,stain,hospital")
    )
    path = data / "dataset.json"
    path.write_text(
        path.read_text().replace('"mpp"', '"licence": "CC0", "magnification": 20, "mpp"')
    )
    assert read_tile_folder(data).tiles["training"]


@pytest.mark.parametrize("written", ["7", "07.PNG", "7.0", "img/007.png", "C:\\img\\007", "x007"])
def test_a_file_that_a_spreadsheets_name_may_mean_is_named(data: Path, written: str):
    for folder in ("img", "mask"):
        (data / folder / "tile0.png").rename(data / folder / "007.png")
    path = data / "folds.csv"
    path.write_text(path.read_text().replace("tile0,", f"{written},"))
    with raises(DatasetError, written) as caught:
        read_tile_folder(data)
    assert ("Is 007.png meant" in str(caught.value)) == (written != "x007")


def remove_image(data: Path) -> None:
    (data / "img" / "tile0.png").unlink()


def remove_mask(data: Path) -> None:
    (data / "mask" / "tile0.png").unlink()


def remove_folds(data: Path) -> None:
    (data / "folds.csv").unlink()


def remove_description(data: Path) -> None:
    (data / "dataset.json").unlink()


def rename_column(data: Path) -> None:
    path = data / "folds.csv"
    path.write_text(path.read_text().replace("img_id", "image"))


def write_a_word_as_fold(data: Path) -> None:
    with (data / "folds.csv").open("a") as file:
        file.write("tile1,train\n")


def name_one_class(data: Path) -> None:
    write_classes(data, [{"name": "Tumor", "color": "#ff0000"}])


def name_a_class_twice(data: Path) -> None:
    write_classes(data, [{"name": "Tumor", "color": "#ff0000"}] * 2)


def give_a_color_name(data: Path) -> None:
    classes = [{"name": "Tumor", "color": "red"}, {"name": "Stroma", "color": "#00ff00"}]
    write_classes(data, classes)


def give_no_color(data: Path) -> None:
    write_classes(data, [{"name": "Tumor", "color": None}, {"name": "Stroma", "color": "#00ff00"}])


def name_a_class_mean(data: Path) -> None:
    classes = [{"name": "mean", "color": "#ff0000"}, {"name": "Stroma", "color": "#00ff00"}]
    write_classes(data, classes)


def name_a_class_on_two_lines(data: Path) -> None:
    classes = [{"name": "Tumor\ncells", "color": "#ff0000"}, {"name": "S", "color": "#00ff00"}]
    write_classes(data, classes)


def name_a_class_with_spaces_around(data: Path) -> None:
    write_classes(data, [{"name": "A ", "color": "#ff0000"}, {"name": "A", "color": "#00ff00"}])


def give_no_name(data: Path) -> None:
    write_classes(data, [{"name": None, "color": "#ff0000"}, {"name": "A", "color": "#00ff00"}])


def write_folds_in_latin_1(data: Path) -> None:
    (data / "folds.csv").write_text("img_id,fold\nGewebe_für_Prüfung,1\n", encoding="latin-1")


def state_mpp_twice(data: Path) -> None:
    path = data / "dataset.json"
    path.write_text(path.read_text().replace('"mpp"', '"mpp": 0.25, "mpp"'))


def state_a_truth_as_mpp(data: Path) -> None:
    path = data / "dataset.json"
    path.write_text(path.read_text().replace("0.5", "true"))


def write_classes(data: Path, classes: list[dict[str, str | None]]) -> None:
    (data / "dataset.json").write_text(json.dumps({"mpp": 0.5, "classes": classes}))


@pytest.mark.parametrize(
    ("damage", "values"),
    [
        (remove_image, ("tile0", "img")),
        (remove_mask, ("tile0", "mask")),
        (remove_folds, ("folds.csv",)),
        (remove_description, ("dataset.json",)),
        (rename_column, ("img_id", "fold")),
        (write_a_word_as_fold, ("line 14", "'train'")),
        (name_one_class, ("1 class",)),
        (name_a_class_twice, ("1 different",)),
        (give_a_color_name, ("#rrggbb",)),
        (give_no_color, (None, "#rrggbb")),
        (give_no_name, (None,)),
        (name_a_class_on_two_lines, ("'Tumor\\ncells'", "one line")),
        (name_a_class_with_spaces_around, ("'A '", "spaces")),
        (name_a_class_mean, ("'mean'",)),
        (state_mpp_twice, ("'mpp' is there twice",)),
        (state_a_truth_as_mpp, ("mpp is True",)),
        (write_folds_in_latin_1, ("folds.csv", "UTF-8")),
    ],
)
def test_a_layout_that_is_wrong_is_refused(
    data: Path, damage: Callable[[Path], None], values: tuple[object, ...]
):
    damage(data)
    with raises(DatasetError, *values):
        read_tile_folder(data)


def shrink_mask(data: Path) -> None:
    Image.new("L", (32, 32)).save(data / "mask" / "tile0.png")


def write_label_six(data: Path) -> None:
    Image.new("L", (TILE_SIZE_PX, TILE_SIZE_PX), 6).save(data / "mask" / "tile0.png")


def write_rgb_mask(data: Path) -> None:
    Image.new("RGB", (TILE_SIZE_PX, TILE_SIZE_PX), "#012345").save(data / "mask" / "tile0.png")


def truncate_mask(data: Path) -> None:
    path = data / "mask" / "tile0.png"
    path.write_bytes(path.read_bytes()[:60])


def empty_mask(data: Path) -> None:
    (data / "mask" / "tile0.png").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "values"),
    [
        (shrink_mask, ("32 x 32", "64 x 64")),
        (write_label_six, ("label 6", "5 classes")),
        (write_rgb_mask, ("#012345",)),
        (truncate_mask, ("tile0.png",)),
        (empty_mask, ("tile0.png",)),
    ],
)
def test_a_mask_that_is_wrong_is_refused(
    data: Path, damage: Callable[[Path], None], values: tuple[object, ...]
):
    damage(data)
    with raises(MaskError, *values):
        class_frequencies(read_tile_folder(data))


def test_an_image_that_is_damaged_is_refused(data: Path):
    (data / "img" / "tile0.png").write_bytes(b"not a picture")
    with raises(ImageFileError, "tile0.png"):
        class_frequencies(read_tile_folder(data))


def test_a_class_without_a_training_pixel_is_named(data: Path):
    for mask in (data / "mask").iterdir():
        labels = np.asarray(Image.open(mask)).copy()
        labels[labels == 4] = 0
        Image.fromarray(labels).save(mask)
    with raises(DatasetError, "Necrosis"):
        class_frequencies(read_tile_folder(data))


def test_a_split_without_tiles_is_named(tmp_path: Path):
    data = write_toy_data(tmp_path / "data", num_validation=0)
    with raises(DatasetError, "validation"):
        count_each(read_tile_folder(data), "validation")
