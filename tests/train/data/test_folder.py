import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.errors import raises
from tests.support.toy_data import write_toy_data
from train.data.folder import read_tile_folder
from train.data.pixels import class_frequencies, count_each
from train.errors import DatasetError, ScaleError


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


def test_frequencies_are_shares_of_area_where_um_per_pixel_differ(data_copy: Path):
    folder = read_tile_folder(data_copy)
    first, *others = folder.tiles["training"]
    coarser = replace(folder, tiles={"training": (replace(first, mpp=1.0), *others)})
    counts = [
        np.bincount(np.asarray(Image.open(tile.mask)).ravel(), minlength=6)[1:]
        for tile in folder.tiles["training"]
    ]
    areas = 4 * counts[0] + sum(counts[1:])  # at 0.5 um, a pixel of 1 um is four
    np.testing.assert_allclose(class_frequencies(coarser), areas / areas.sum(), rtol=1e-6)


def test_files_saved_by_a_spreadsheet_are_read(data_copy: Path):
    for name in ("folds.csv", "dataset.json"):
        path = data_copy / name
        path.write_text(path.read_text(), encoding="utf-8-sig", newline="\r\n")
    assert len(read_tile_folder(data_copy).tiles["training"]) == 8


def test_folds_may_have_empty_rows_decimal_points_and_decimal_commas(data_copy: Path):
    path = data_copy / "folds.csv"
    lines = path.read_text().splitlines()[1:]
    rows = [f"{line.replace(',', ';')}.0; P1;0,5" for line in lines]
    path.write_text("\r\n".join(["img_id;fold;group;mpp", *rows, ";;;", ""]), "utf-16")
    found = read_tile_folder(data_copy).tiles
    assert [len(found[split]) for split in ("training", "validation", "test")] == [8, 2, 2]
    assert {(tile.mpp, tile.group) for tile in found["training"]} == {(0.5, "P1")}


@pytest.mark.parametrize("mpp", ["40x", "40", "0", "nan", "-0.5"])
def test_an_absurd_scale_of_an_image_is_refused_with_its_line(data_copy: Path, mpp: str):
    path = data_copy / "folds.csv"
    path.write_text(
        path.read_text().replace("fold\n", "fold,mpp\n").replace("0,1\n", f"0,1,{mpp}\n")
    )
    with raises(ScaleError, path, "line 2", f"{mpp!r}"):
        read_tile_folder(data_copy)


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
    data_copy: Path, file: str, old: str, new: str, meant: str
):
    path = data_copy / file
    path.write_text(path.read_text().replace(old, new))
    with raises(DatasetError, path, f"Is '{meant}' meant"):
        read_tile_folder(data_copy)


def test_other_names_are_the_users_own(data_copy: Path):
    (data_copy / "folds.csv").write_text(
        (data_copy / "folds.csv").read_text().replace("img_id,fold", "img_id,fold,stain,hospital")
    )
    path = data_copy / "dataset.json"
    path.write_text(
        path.read_text().replace('"mpp"', '"licence": "CC0", "magnification": 20, "mpp"')
    )
    assert read_tile_folder(data_copy).tiles["training"]


def test_folds_csv_goes_before_sam_paths_own_list(data_copy: Path):
    (data_copy / "cv.csv").write_text("img_id,fold\ntile0,1\n")
    assert len(read_tile_folder(data_copy).tiles["training"]) == 8


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_folder_or_a_pipe_is_no_image(data_copy: Path, make: Callable[[Path], None]):
    path = data_copy / "img" / "tile0.png"
    path.unlink()
    make(path)
    with raises(DatasetError, "tile0", path.parent):
        read_tile_folder(data_copy)


@pytest.mark.parametrize("written", ["7", "07.PNG", "7.0", "img/007.png", "C:\\img\\007", "x007"])
def test_a_file_that_a_spreadsheets_name_may_mean_is_named(data_copy: Path, written: str):
    for folder in ("img", "mask"):
        (data_copy / folder / "tile0.png").rename(data_copy / folder / "007.png")
    path = data_copy / "folds.csv"
    path.write_text(path.read_text().replace("tile0,", f"{written},"))
    with raises(DatasetError, written) as caught:
        read_tile_folder(data_copy)
    assert ("Is 007.png meant" in str(caught.value)) == (written != "x007")


def removed(name: str) -> Callable[[Path], None]:
    return lambda data: (data / name).unlink()


def edited(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(data: Path) -> None:
        path = data / name
        path.write_text(path.read_text().replace(old, new))

    return edit


def classes(*entries: tuple[str | None, str | None]) -> Callable[[Path], object]:
    described = [{"name": name, "color": color} for name, color in entries]
    content = json.dumps({"mpp": 0.5, "classes": described})
    return lambda data: (data / "dataset.json").write_text(content)


def write_folds_in_latin_1(data: Path) -> None:
    (data / "folds.csv").write_text("img_id,fold\nGewebe_für_Prüfung,1\n", encoding="latin-1")


RED, GREEN = "#ff0000", "#00ff00"


@pytest.mark.parametrize(
    ("damage", "values"),
    [
        (removed("img/tile0.png"), ("tile0", "img")),
        (removed("mask/tile0.png"), ("tile0", "mask")),
        (removed("folds.csv"), ("folds.csv",)),
        (removed("dataset.json"), ("dataset.json",)),
        (edited("folds.csv", "img_id", "image"), ("img_id", "fold")),
        (edited("folds.csv", "fold", "split"), ("img_id", "fold")),
        (edited("folds.csv", "tile1,1", "tile1,1.5"), ("line 3", "'1.5'")),
        (edited("folds.csv", "tile1,1", "tile1,train"), ("line 3", "'train'")),
        (classes(("Tumor", RED)), ("1 class",)),
        (classes(("Tumor", RED), ("Tumor", RED)), ("1 different",)),
        (classes(("Tumor", "red"), ("Stroma", GREEN)), ("#rrggbb",)),
        (classes(("Tumor", None), ("Stroma", GREEN)), (None, "#rrggbb")),
        (classes((None, RED), ("Stroma", GREEN)), (None,)),
        (classes(("Tumor\ncells", RED), ("S", GREEN)), ("'Tumor\\ncells'", "one line")),
        (classes(("A ", RED), ("A", GREEN)), ("'A '", "spaces")),
        (classes(("mean", RED), ("Stroma", GREEN)), ("'mean'",)),
        (edited("dataset.json", '"mpp"', '"mpp": 0.25, "mpp"'), ("'mpp' is there twice",)),
        (edited("dataset.json", "0.5", "true"), ("mpp is True",)),
        (edited("dataset.json", "0.5", "9" * 400), ("too large",)),
        (edited("dataset.json", "{", "[" * 100_000), ("nested too deeply",)),
        (edited("folds.csv", "tile1,", "/data/tile1,"), ("/data/tile1",)),
        (edited("folds.csv", "tile1,", "../tile1,"), ("../tile1",)),
        (write_folds_in_latin_1, ("folds.csv", "UTF-8")),
    ],
)
def test_a_layout_that_is_wrong_is_refused(
    data_copy: Path, damage: Callable[[Path], object], values: tuple[object, ...]
):
    damage(data_copy)
    with raises(DatasetError, *values):
        read_tile_folder(data_copy)


def test_a_class_without_a_training_pixel_is_named(data_copy: Path):
    for mask in (data_copy / "mask").iterdir():
        labels = np.asarray(Image.open(mask)).copy()
        labels[labels == 4] = 0
        Image.fromarray(labels).save(mask)
    with raises(DatasetError, "Necrosis"):
        class_frequencies(read_tile_folder(data_copy))


def test_a_split_without_tiles_is_named(tmp_path: Path):
    data = write_toy_data(tmp_path / "data", num_validation=0)
    with raises(DatasetError, "validation"):
        count_each(read_tile_folder(data), "validation")
