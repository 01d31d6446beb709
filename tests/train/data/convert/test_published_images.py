"""OCELOT and GlaS, drawn small in their published layouts."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.errors import raises
from train.data.convert.glas import GlasSettings, prepare_glas
from train.data.convert.images import FoldSettings
from train.data.convert.ocelot import OcelotSettings, prepare_ocelot
from train.data.folder import read_tile_folder
from train.data.pixels import read_mask
from train.errors import ImageFileError, MaskError, SourceError

OFFICIAL = FoldSettings(parts="official")


def write_ocelot(root: Path, *, num: int = 12, subsets: tuple[str, ...] = ("train",)) -> Path:
    pairs = {}
    rng = np.random.default_rng(0)
    for index in range(num):
        name, subset = f"{index:03d}", subsets[index % len(subsets)]
        for kind in ("images", "annotations"):
            (root / kind / subset / "tissue").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / subset / "tissue" / f"{name}.jpg")
        mask = np.full((16, 16), 1 + index % 2, np.uint8)
        mask[0] = 255
        Image.fromarray(mask).save(root / "annotations" / subset / "tissue" / f"{name}.png")
        pairs[name] = {
            "slide_name": f"TCGA-A3-{index // 2:04d}-01Z-00-DX1.8FA7",
            "subset": subset,
            "tissue": {"resized_mpp_x": 0.778 if index else 0.8, "resized_mpp_y": 0.778},
        }
    (root / "metadata.json").write_text(json.dumps({"sample_pairs": pairs}))
    return root


def folds_of(data: Path) -> dict[str, dict[str, str]]:
    with (data / "folds.csv").open() as file:
        return {row["img_id"]: row for row in csv.DictReader(file)}


def test_ocelot_has_folds_by_case_each_images_mpp_and_no_unknown_pixel(tmp_path: Path):
    prepare_ocelot(write_ocelot(tmp_path / "source"), tmp_path / "out", OcelotSettings())
    rows = folds_of(tmp_path / "out")
    assert all(rows[f"{n:03d}"]["fold"] == rows[f"{n + 1:03d}"]["fold"] for n in range(0, 12, 2))
    assert {"-1", "0"} < {row["fold"] for row in rows.values()}
    folder = read_tile_folder(tmp_path / "out")
    tiles = {tile.tile_id: tile for found in folder.tiles.values() for tile in found}
    assert (tiles["000"].mpp, tiles["001"].mpp, folder.mpp) == (0.8, 0.778, 0.778)
    mask = read_mask(tiles["001"].mask, 2)
    assert (mask[0] == 0).all()
    assert (mask[1:] == 2).all()


def test_ocelots_official_parts_are_kept_where_asked_and_straddlers_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = write_ocelot(tmp_path / "source", subsets=("train", "val", "test"))
    prepare_ocelot(source, tmp_path / "out", OcelotSettings(folds=OFFICIAL))
    rows = folds_of(tmp_path / "out")
    assert [rows[name]["fold"] for name in ("000", "001", "002")] == ["1", "0", "-1"]
    assert "6 of 6 patients or slides are in several official parts" in capsys.readouterr().out


def test_a_folder_that_is_not_ocelot_is_refused(tmp_path: Path):
    with raises(SourceError, "metadata.json"):
        prepare_ocelot(tmp_path, tmp_path / "out", OcelotSettings())
    assert not (tmp_path / "out").exists()


def write_glas(root: Path) -> Path:
    root.mkdir()
    rng = np.random.default_rng(0)
    lines = ["name, patient ID, grade (GlaS), grade (Sirinukunwattana et al. 2015)"]
    for index in range(12):
        name = f"{'train' if index < 8 else 'testA'}_{index + 1}"
        pixels = rng.integers(0, 255, (9, 14, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"{name}.bmp")
        mask = np.zeros((9, 14), np.uint8)
        mask[2:5, 3:9] = 1 + index
        Image.fromarray(mask).save(root / f"{name}_anno.bmp")
        grade = "malignant" if index % 6 < 3 else "benign"
        lines.append(f"{name}, {index % 6}, {grade}, moderate")
    (root / "Grade.csv").write_text("\n".join(lines))
    return root


def test_glas_is_gland_or_not_with_folds_by_patient(tmp_path: Path):
    prepare_glas(write_glas(tmp_path / "source"), tmp_path / "out", GlasSettings())
    rows = folds_of(tmp_path / "out")
    assert all(rows[f"train_{n}"]["fold"] == rows[f"testA_{n + 6}"]["fold"] for n in (3, 4, 5, 6))
    folder = read_tile_folder(tmp_path / "out")
    assert [entry.name for entry in folder.classes] == ["Non-gland", "Gland"]
    tile = next(t for found in folder.tiles.values() for t in found if t.tile_id == "train_8")
    assert np.bincount(read_mask(tile.mask, 2).ravel()).tolist() == [0, 9 * 14 - 18, 18]


def test_glas_by_grade_has_the_images_grade_for_its_glands(tmp_path: Path):
    settings = GlasSettings(classes="grade", folds=OFFICIAL)
    prepare_glas(write_glas(tmp_path / "source"), tmp_path / "out", settings)
    rows = folds_of(tmp_path / "out")
    assert {rows[f"testA_{n}"]["fold"] for n in (9, 10, 11, 12)} == {"-1"}
    masks = {p.stem: set(np.unique(Image.open(p))) for p in (tmp_path / "out" / "mask").iterdir()}
    assert masks["train_1"] == {1, 3}
    assert masks["train_4"] == {1, 2}


def assert_refused(prepare: Any, source: Path, settings: object, *told: str) -> None:
    """Check that a source is not converted, and that nothing is left beside it."""
    with raises(ImageFileError, *told):
        prepare(source, source.with_name("out"), settings)
    assert [path.name for path in source.parent.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("write", "prepare", "settings", "mask"),
    [
        (write_ocelot, prepare_ocelot, OcelotSettings(), "annotations/train/tissue/003.png"),
        (write_glas, prepare_glas, GlasSettings(), "train_3_anno.bmp"),
    ],
)
def test_a_mask_of_another_size_than_its_image_is_refused_and_nothing_is_left(
    tmp_path: Path, write: Any, prepare: Any, settings: object, mask: str
):
    source = write(tmp_path / "source")
    Image.new("L", (5, 4), 1).save(source / mask)
    assert_refused(prepare, source, settings, "3", "5 x 4")


@pytest.mark.parametrize(
    ("write", "prepare", "settings", "image"),
    [
        (write_ocelot, prepare_ocelot, OcelotSettings(), "images/train/tissue/003.jpg"),
        (write_glas, prepare_glas, GlasSettings(), "train_3.png"),
    ],
)
def test_an_image_that_exif_turns_is_refused_and_nothing_is_left(
    tmp_path: Path, write: Any, prepare: Any, settings: object, image: str
):
    source = write(tmp_path / "source")
    for path in (source / "train_3.bmp", source / "train_3_anno.bmp"):
        if path.exists():
            Image.open(path).save(path.with_suffix(".png"))
            path.unlink()
    turned = Image.open(source / image)
    turned.getexif()[0x0112] = 3  # half a turn, which leaves the size as it is
    turned.save(source / image, exif=turned.getexif())
    assert_refused(prepare, source, settings, image, "orientation 3")


def test_a_coloured_picture_of_glands_is_refused(tmp_path: Path):
    source = write_glas(tmp_path / "source")
    Image.new("RGB", (14, 9)).save(source / "train_3_anno.bmp")
    with raises(MaskError, "train_3_anno.bmp", "RGB"):
        prepare_glas(source, tmp_path / "out", GlasSettings())


def test_an_image_of_glas_with_two_patients_is_refused(tmp_path: Path):
    source = write_glas(tmp_path / "source")
    grades = source / "Grade.csv"
    same = grades.read_text() + "\ntrain_1, 0, malignant, moderate"
    grades.write_text(same)
    prepare_glas(source, tmp_path / "out", GlasSettings())
    grades.write_text(same.replace("train_1, 0", "train_1, 3", 1))
    with raises(SourceError, grades, "train_1", "twice"):
        prepare_glas(source, tmp_path / "again", GlasSettings())


@pytest.mark.parametrize("mpp", [0, -1, float("nan"), 1e9])
def test_an_um_per_pixel_of_ocelot_that_none_has_is_refused(mpp: float, tmp_path: Path):
    source = write_ocelot(tmp_path / "source")
    content = json.loads((source / "metadata.json").read_text())
    content["sample_pairs"]["000"]["tissue"]["resized_mpp_x"] = mpp
    (source / "metadata.json").write_text(json.dumps(content))
    with raises(SourceError, "pair 000", mpp):
        prepare_ocelot(source, tmp_path / "out", OcelotSettings())
    assert not (tmp_path / "out").exists()


def test_an_image_of_glas_without_its_grade_is_named(tmp_path: Path):
    source = write_glas(tmp_path / "source")
    grades = source / "Grade.csv"
    grades.write_text(grades.read_text().replace("train_3,", "train_99,"))
    with raises(SourceError, grades, "train_3"):
        prepare_glas(source, tmp_path / "out", GlasSettings())
