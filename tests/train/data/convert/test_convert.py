import csv
import json
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.errors import raises
from train.cli import main
from train.data.convert import layout
from train.data.convert.bcss import CODES, BcssSettings, prepare_bcss
from train.data.convert.bdsa import BdsaSettings, prepare_bdsa
from train.data.convert.crag import CragSettings, prepare_crag
from train.data.convert.layout import TileSettings, assign_folds, tile_starts
from train.data.convert.shapes import fill_shape
from train.data.folder import read_tile_folder
from train.data.images import read_image
from train.data.masks import read_mask
from train.errors import (
    AnnotationError,
    DestinationError,
    FocalPathError,
    ImageFileError,
    MaskError,
    ScaleError,
    SettingsError,
    SourceError,
)

SIDE = 32
"""Side of the test's regions, in pixels."""


def write_bcss(
    source: Path, patients: list[str], codes: np.ndarray | None = None, mpp: str = "_MPP-0.2500"
) -> None:
    """One region a patient, in the published names and folders; by default all of it tumor."""
    if codes is None:
        codes = np.ones((SIDE, SIDE), np.uint8)
    for folder in ("rgbs_colorNormalized", "masks"):
        (source / folder).mkdir(parents=True, exist_ok=True)
    for patient in patients:
        name = f"{patient}-DX1_xmin45749_ymin25055{mpp}.png"
        image = np.full((*codes.shape, 3), 200, np.uint8)
        Image.fromarray(image).save(source / "rgbs_colorNormalized" / name)
        Image.fromarray(codes).save(source / "masks" / name)


def write_crag(source: Path, num_train: int = 3, num_test: int = 1, side: int = SIDE) -> None:
    for folder, split, count in (("train", "train", num_train), ("valid", "test", num_test)):
        for kind in ("Images", "Annotation"):
            (source / folder / kind).mkdir(parents=True, exist_ok=True)
        for number in range(1, count + 1):
            glands = np.zeros((side, side), np.uint8)
            glands[: side // 4], glands[-side // 4 :] = 1, 2
            image = Image.fromarray(np.full((side, side, 3), 180, np.uint8))
            image.save(source / folder / "Images" / f"{split}_{number}.png")
            Image.fromarray(glands).save(source / folder / "Annotation" / f"{split}_{number}.png")


def polygon(label: str, *corners: tuple[float, float], **more: object) -> dict[str, object]:
    points = [[x, y, 0] for x, y in corners]
    return {"type": "polyline", "closed": True, "points": points, "group": label, **more}


def square(label: str, low: float, high: float, **more: object) -> dict[str, object]:
    return polygon(label, (low, low), (high, low), (high, high), (low, high), **more)


def write_bdsa(
    source: Path, elements: list[dict[str, object]], names: tuple[str, ...] = ("a", "b")
) -> None:
    """Regions of `SIDE` pixels that all have the same annotations."""
    for folder in ("images", "annotations"):
        (source / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        image = Image.fromarray(np.full((SIDE, SIDE, 3), 220, np.uint8))
        image.save(source / "images" / f"{name}.png")
        document = {"annotation": {"name": "tissue", "elements": elements}}
        (source / "annotations" / f"{name}.json").write_text(json.dumps(document))


def bcss_settings(**tiles: float) -> BcssSettings:
    return BcssSettings(tiles=TileSettings(**{"tile_size_px": SIDE, "num_folds": 2, **tiles}))


def crag_settings(**tiles: float) -> CragSettings:
    return CragSettings(tiles=TileSettings(**{"tile_size_px": SIDE, "mpp": 0.55, **tiles}))


def bdsa_settings(**changes: object) -> BdsaSettings:
    values = {"tiles": TileSettings(tile_size_px=SIDE, mpp=0.5), "source_mpp": 0.5}
    return BdsaSettings(**{**values, "test_share": 0, **changes})  # type: ignore[arg-type]


def bdsa_labels(source: Path, out: Path, **changes: object) -> np.ndarray:
    prepare_bdsa(source, out, bdsa_settings(**changes))
    return read_mask(out / "mask" / "a.png", 5)


def folds(out: Path) -> list[dict[str, str]]:
    with (out / "folds.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def refuse_to_draw(
    source: Path, out: Path, kind: type[FocalPathError], *values: object, **changes: object
) -> None:
    with raises(kind, *values):
        prepare_bdsa(source, out, bdsa_settings(**changes))
    assert not out.exists()


# What the sources share


@pytest.mark.parametrize(
    ("length_px", "starts"),
    [
        (2467, [0, 722, 1443]),
        (4838, [0, 954, 1908, 2861, 3814]),
        (6275, [0, 876, 1751, 2626, 3501, 4376, 5251]),
        (1036, [0, 12]),
        (1024, [0]),
        (957, [0]),
    ],
)
def test_tiles_of_bcss_lie_where_sam_path_cut_them(length_px: int, starts: list[int]) -> None:
    assert tile_starts(length_px, 1024) == starts


def test_folds_hold_about_as_many_tiles() -> None:
    num_tiles = {"large": 10, **{f"small {index}": 1 for index in range(10)}}
    found = assign_folds(num_tiles, 2, seed=0)
    assert sorted(found.values()).count(found["large"]) == 1


def test_the_largest_patient_is_not_for_validation() -> None:
    assert assign_folds({"large": 10, "small": 1, "other": 1}, 3, seed=0)["large"] != 0


def test_a_patient_alone_cannot_be_split_into_training_and_validation() -> None:
    with raises(SourceError, "one"):
        assign_folds({"one": 100}, 5, seed=0)


def test_with_fewer_patients_than_folds_some_are_still_for_validation() -> None:
    assert set(assign_folds({"one": 3, "two": 1}, 5, seed=0).values()) == {0, 1}


def test_images_are_averaged_when_made_smaller() -> None:
    stripes = np.zeros((4, 4, 3), np.uint8)
    stripes[:, ::2] = 200
    assert (layout.resample_image(Image.fromarray(stripes), 0.5) == 100).all()


def test_labels_are_never_mixed_when_made_smaller() -> None:
    labels = np.kron(np.array([[1, 5], [5, 1]], np.uint8), np.ones((3, 3), np.uint8))
    assert set(np.unique(layout.resample_labels(labels, 0.5))) == {1, 5}


def test_regions_beyond_pillows_bomb_limit_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (64, 64)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert layout.read_region_image(tmp_path / "large.png").size == (64, 64)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_regions_beyond_our_own_limit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (1200, 1000)).save(tmp_path / "large.png")
    monkeypatch.setattr(layout, "MAX_REGION_MEGAPIXELS", 1)
    with raises(ImageFileError, "1200 x 1000", "1 megapixels"):
        layout.read_region_image(tmp_path / "large.png")


# BCSS


def test_bcss_codes_are_grouped_into_five_classes(tmp_path: Path) -> None:
    codes = np.repeat(np.arange(22, dtype=np.uint8)[None], 4, axis=0)
    write_bcss(tmp_path / "in", ["TCGA-A1-A0SK", "TCGA-A2-A04P"], codes)
    prepare_bcss(tmp_path / "in", tmp_path / "out", bcss_settings())
    name = "TCGA-A1-A0SK-DX1_xmin45749_ymin25055_MPP-0.2500.png"
    labels = read_mask(tmp_path / "out" / "mask" / name, 5)
    expected = [0, 1, 2, 3, 4, 5, 5, 0, 5, 5, 3, 3, 5, 5, 5, 5, 5, 5, 5, 1, 1, 5]
    assert labels[0, :22].tolist() == expected


def test_prepared_bcss_is_a_data_set_that_training_reads(tmp_path: Path) -> None:
    write_bcss(tmp_path / "in", ["TCGA-A1-A0SK", "TCGA-A2-A04P", "TCGA-OL-A66P"])
    prepare_bcss(tmp_path / "in", tmp_path / "out", bcss_settings())
    folder = read_tile_folder(tmp_path / "out")
    assert [entry.name for entry in folder.classes][:2] == ["Tumor", "Stroma"]
    assert (folder.mpp, *map(len, folder.tiles.values())) == (0.25, 1, 1, 1)


def test_bcss_slides_of_the_published_institutes_are_for_testing(tmp_path: Path) -> None:
    others = ["TCGA-A1-A0SK", "TCGA-E9-A5FL", "TCGA-GI-A2C9"]
    test = [f"TCGA-{institute}-A000" for institute in ("E2", "EW", "GM", "LL", "OL", "S3")]
    write_bcss(tmp_path / "in", others + test)
    prepare_bcss(tmp_path / "in", tmp_path / "out", bcss_settings())
    assert {row["group"] for row in folds(tmp_path / "out") if row["fold"] == "-1"} == set(test)


def test_all_tiles_of_a_bcss_patient_share_a_fold(tmp_path: Path) -> None:
    patients = [f"TCGA-A{number}-AAAA" for number in range(4)]
    write_bcss(tmp_path / "in", patients, np.ones((40, 50), np.uint8))
    prepare_bcss(tmp_path / "in", tmp_path / "out", bcss_settings())
    rows = folds(tmp_path / "out")
    assert len(rows) == 4 * 4
    assert len({(row["group"], row["fold"]) for row in rows}) == 4


def test_bcss_tiles_overlap_at_the_end_rather_than_miss_pixels(tmp_path: Path) -> None:
    codes = np.arange(40 * 40).reshape(40, 40).astype(np.uint8) % 2 + 1
    write_bcss(tmp_path / "in", ["TCGA-A1-A0SK", "TCGA-A2-A04P"], codes)
    prepare_bcss(tmp_path / "in", tmp_path / "out", bcss_settings())
    region = "TCGA-A1-A0SK-DX1_xmin45749_ymin25055_MPP-0.2500"
    last = read_mask(tmp_path / "out" / "mask" / f"{region}_8_8.png", 5)
    np.testing.assert_array_equal(last, codes[8:, 8:])


def test_bcss_regions_smaller_than_a_tile_are_padded_unlabelled(tmp_path: Path) -> None:
    write_bcss(tmp_path / "in", ["TCGA-A1-A0SK", "TCGA-A2-A04P"], np.ones((20, 30), np.uint8))
    prepare_bcss(tmp_path / "in", tmp_path / "out", bcss_settings())
    tile = read_tile_folder(tmp_path / "out").tiles["training"][0]
    labels, image = read_mask(tile.mask, 5), read_image(tile.image)
    assert labels.shape == (SIDE, SIDE)
    assert (labels[:20, :30] == 1).all()
    assert labels.sum() == 20 * 30
    assert (image[20:] == 255).all()


def test_bcss_regions_are_resampled_from_the_mpp_in_their_name(tmp_path: Path) -> None:
    write_bcss(tmp_path / "in", ["TCGA-A1-A0SK", "TCGA-A2-A04P"])
    prepare_bcss(tmp_path / "in", tmp_path / "out", bcss_settings(mpp=0.5))
    tile = read_tile_folder(tmp_path / "out").tiles["training"][0]
    assert np.count_nonzero(read_mask(tile.mask, 5)) == (SIDE // 2) ** 2


def test_bcss_tiles_without_enough_labels_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = np.ones((SIDE, 2 * SIDE), np.uint8)
    codes[:, SIDE + 4 :] = 0
    write_bcss(tmp_path / "in", ["TCGA-A1-A0SK", "TCGA-A2-A04P"], codes)
    prepare_bcss(tmp_path / "in", tmp_path / "out", bcss_settings(min_labelled_share=0.2))
    assert all(row["img_id"].endswith("_0_0") for row in folds(tmp_path / "out"))
    assert "2 of 4 tiles were left out" in capsys.readouterr().out


def test_unknown_bcss_codes_become_unlabelled_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = np.ones((SIDE, SIDE), np.uint8)
    codes[0, :3] = 37
    write_bcss(tmp_path / "in", ["TCGA-A1-A0SK", "TCGA-A2-A04P"], codes)
    prepare_bcss(tmp_path / "in", tmp_path / "out", bcss_settings())
    tile = read_tile_folder(tmp_path / "out").tiles["training"][0]
    assert np.count_nonzero(read_mask(tile.mask, 5) == 0) == 3
    assert "37 (6 pixels)" in capsys.readouterr().out


def test_a_bcss_code_table_of_another_release_is_refused(tmp_path: Path) -> None:
    write_bcss(tmp_path / "in", ["TCGA-A1-A0SK", "TCGA-A2-A04P"])
    (tmp_path / "in" / "meta").mkdir()
    table = tmp_path / "in" / "meta" / "gtruth_codes.tsv"
    rows = [f"{label}\t{code}" for label, (code, _) in CODES.items()]
    table.write_text("\n".join(["label\tGT_code", *rows]) + "\n")
    prepare_bcss(tmp_path / "in", tmp_path / "out", bcss_settings())
    table.write_text("label\tGT_code\ntumor\t2\n")
    with raises(SourceError, table, "'tumor'", 2, 1):
        prepare_bcss(tmp_path / "in", tmp_path / "other", bcss_settings())


def test_a_bcss_mask_of_another_size_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    write_bcss(tmp_path / "in", ["TCGA-A1-A0SK", "TCGA-A2-A04P"])
    mask = max((tmp_path / "in" / "masks").iterdir())
    Image.new("L", (SIDE, SIDE - 1)).save(mask)
    with raises(ImageFileError, mask, "32 x 31", "32 x 32"):
        prepare_bcss(tmp_path / "in", tmp_path / "out", bcss_settings())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_bcss_mask_in_colour_is_refused(tmp_path: Path) -> None:
    write_bcss(tmp_path / "in", ["TCGA-A1-A0SK", "TCGA-A2-A04P"])
    mask = min((tmp_path / "in" / "masks").iterdir())
    Image.new("RGB", (SIDE, SIDE)).save(mask)
    with raises(MaskError, mask, "RGB"):
        prepare_bcss(tmp_path / "in", tmp_path / "out", bcss_settings())


def test_a_damaged_bcss_image_is_named(tmp_path: Path) -> None:
    write_bcss(tmp_path / "in", ["TCGA-A1-A0SK", "TCGA-A2-A04P"])
    image = min((tmp_path / "in" / "rgbs_colorNormalized").iterdir())
    image.write_bytes(image.read_bytes()[:60])
    with raises(ImageFileError, image):
        prepare_bcss(tmp_path / "in", tmp_path / "out", bcss_settings())


def test_a_bcss_image_without_its_mask_is_refused(tmp_path: Path) -> None:
    write_bcss(tmp_path / "in", ["TCGA-A1-A0SK", "TCGA-A2-A04P"])
    min((tmp_path / "in" / "masks").iterdir()).unlink()
    with raises(SourceError, "masks lacks 1", "A1-A0SK"):
        prepare_bcss(tmp_path / "in", tmp_path / "out", bcss_settings())


def test_bcss_files_of_another_name_are_refused(tmp_path: Path) -> None:
    write_bcss(tmp_path / "in", ["slide-one", "slide-two"])
    with raises(SourceError, "slide-one"):
        prepare_bcss(tmp_path / "in", tmp_path / "out", bcss_settings())


def test_bcss_names_without_mpp_need_it_as_an_option(tmp_path: Path) -> None:
    write_bcss(tmp_path / "in", ["TCGA-A1-A0SK", "TCGA-A2-A04P"], mpp="")
    with raises(ScaleError, "--source-mpp"):
        prepare_bcss(tmp_path / "in", tmp_path / "out", bcss_settings())
    settings = BcssSettings(tiles=TileSettings(tile_size_px=SIDE), source_mpp=0.25)
    prepare_bcss(tmp_path / "in", tmp_path / "out", settings)
    assert len(folds(tmp_path / "out")) == 2


def test_enlarged_bcss_regions_are_warned_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bcss(tmp_path / "in", ["TCGA-A1-A0SK", "TCGA-A2-A04P"], mpp="_MPP-0.5000")
    prepare_bcss(tmp_path / "in", tmp_path / "out", bcss_settings())
    assert "2 regions" in capsys.readouterr().out


def test_an_existing_output_folder_is_refused_untouched(tmp_path: Path) -> None:
    write_bcss(tmp_path / "in", ["TCGA-A1-A0SK", "TCGA-A2-A04P"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with raises(DestinationError, tmp_path / "out"):
        prepare_bcss(tmp_path / "in", tmp_path / "out", bcss_settings())
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


def test_masks_without_any_label_are_refused(tmp_path: Path) -> None:
    write_bcss(tmp_path / "in", ["TCGA-A1-A0SK", "TCGA-A2-A04P"], np.zeros((9, 9), np.uint8))
    with raises(MaskError, "2 tiles", 0.0):
        prepare_bcss(tmp_path / "in", tmp_path / "out", bcss_settings())
    assert not (tmp_path / "out").exists()


# CRAG


def test_numbered_crag_glands_become_one_class(tmp_path: Path) -> None:
    write_crag(tmp_path / "in")
    prepare_crag(tmp_path / "in", tmp_path / "out", crag_settings())
    labels = read_mask(tmp_path / "out" / "mask" / "train_1.png", 2)
    assert [labels[0, 0], labels[SIDE // 2, 0], labels[-1, 0]] == [2, 1, 2]


def test_crag_images_of_valid_are_for_testing(tmp_path: Path) -> None:
    write_crag(tmp_path / "in", num_train=4, num_test=2)
    prepare_crag(tmp_path / "in", tmp_path / "out", crag_settings())
    rows = {row["img_id"]: int(row["fold"]) for row in folds(tmp_path / "out")}
    assert {name for name, fold in rows.items() if fold == -1} == {"test_1", "test_2"}
    assert {0} < {fold for name, fold in rows.items() if name.startswith("train")}


def test_crag_folds_depend_on_the_seed_only(tmp_path: Path) -> None:
    write_crag(tmp_path / "in", num_train=12)
    drawn = []
    for index, seed in enumerate((0, 0, 1)):
        prepare_crag(tmp_path / "in", tmp_path / str(index), crag_settings(seed=seed))
        drawn.append(folds(tmp_path / str(index)))
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_crag_images_are_padded_not_stretched(tmp_path: Path) -> None:
    write_crag(tmp_path / "in", side=24)
    prepare_crag(tmp_path / "in", tmp_path / "out", crag_settings())
    labels = read_mask(tmp_path / "out" / "mask" / "train_1.png", 2)
    assert labels.shape == (SIDE, SIDE)
    assert np.count_nonzero(labels) == 24 * 24


def test_crag_masks_with_more_than_255_glands_are_read(tmp_path: Path) -> None:
    write_crag(tmp_path / "in")
    glands = np.full((SIDE, SIDE), 256, np.uint16)
    Image.fromarray(glands).save(tmp_path / "in" / "train" / "Annotation" / "train_1.png")
    prepare_crag(tmp_path / "in", tmp_path / "out", crag_settings())
    assert (read_mask(tmp_path / "out" / "mask" / "train_1.png", 2) == 2).all()


def test_spare_crag_masks_are_left_out_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_crag(tmp_path / "in", num_test=2)
    (tmp_path / "in" / "valid" / "Images" / "test_2.png").unlink()
    prepare_crag(tmp_path / "in", tmp_path / "out", crag_settings())
    assert "1 masks" in capsys.readouterr().out
    assert "test_2" not in {row["img_id"] for row in folds(tmp_path / "out")}


def test_a_crag_image_without_its_mask_is_refused(tmp_path: Path) -> None:
    write_crag(tmp_path / "in")
    (tmp_path / "in" / "train" / "Annotation" / "train_2.png").unlink()
    with raises(SourceError, "lacks 1 masks", "train_2.png"):
        prepare_crag(tmp_path / "in", tmp_path / "out", crag_settings())


def test_a_folder_that_is_not_crag_is_refused(tmp_path: Path) -> None:
    with raises(SourceError, tmp_path, "train"):
        prepare_crag(tmp_path, tmp_path / "out", crag_settings())


# BDSA


def test_a_polygon_covers_the_pixels_whose_centre_is_inside(tmp_path: Path) -> None:
    write_bdsa(tmp_path / "in", [square("Gray Matter", 2.4, 10.4)])
    expected = np.zeros((SIDE, SIDE), np.uint8)
    expected[2:10, 2:10] = 2
    np.testing.assert_array_equal(bdsa_labels(tmp_path / "in", tmp_path / "out"), expected)


def test_neighbouring_polygons_neither_overlap_nor_leave_a_gap() -> None:
    labels = np.zeros((20, 20), np.uint8)
    edge = [(11.3, 20.0), (4.7, 0.0)]
    fill_shape(labels, (np.array([(0.0, 0.0), (0.0, 20.0), *edge]),), 1)
    right = np.zeros((20, 20), np.uint8)
    fill_shape(right, (np.array([(20.0, 0.0), (20.0, 20.0), *edge]),), 2)
    assert (labels + right > 0).all()
    assert not (labels * right).any()


def test_the_later_element_covers_the_earlier(tmp_path: Path) -> None:
    elements = [square("Gray Matter", 0, 20), square("Superficial Cortex", 5, 10)]
    write_bdsa(tmp_path / "in", elements)
    labels = bdsa_labels(tmp_path / "in", tmp_path / "out")
    assert (labels[7, 7], labels[15, 15]) == (5, 2)


def test_by_area_the_smaller_element_covers_the_larger_in_any_order(tmp_path: Path) -> None:
    elements = [square("Superficial Cortex", 5, 10), square("Gray Matter", 0, 20)]
    write_bdsa(tmp_path / "in", elements)
    assert bdsa_labels(tmp_path / "in", tmp_path / "file")[7, 7] == 2
    assert bdsa_labels(tmp_path / "in", tmp_path / "area", overlap="area")[7, 7] == 5


def test_holes_show_what_is_below(tmp_path: Path) -> None:
    hole = [[5, 5, 0], [10, 5, 0], [10, 10, 0], [5, 10, 0]]
    elements = [square("White Matter", 0, 20), square("Gray Matter", 2, 15, holes=[hole])]
    write_bdsa(tmp_path / "in", elements)
    labels = bdsa_labels(tmp_path / "in", tmp_path / "out")
    assert (labels[5:10, 5:10] == 3).all()
    assert np.count_nonzero(labels == 2) == 13**2 - 5**2


def test_rectangles_turn_as_in_the_archives_viewer(tmp_path: Path) -> None:
    # 30 degrees from x towards y of the image: down and to the right.
    rectangle = {"type": "rectangle", "center": [16, 16, 0], "width": 24, "height": 4}
    write_bdsa(tmp_path / "in", [{**rectangle, "rotation": math.pi / 6, "group": "Leptomeninges"}])
    labels = bdsa_labels(tmp_path / "in", tmp_path / "out")
    assert (labels[20, 23], labels[11, 23]) == (4, 0)
    assert np.count_nonzero(labels) == pytest.approx(24 * 4, rel=0.05)


def test_circles_and_ellipses_have_their_area(tmp_path: Path) -> None:
    circle = {"type": "circle", "center": [8, 8, 0], "radius": 6, "group": "Gray Matter"}
    ellipse = {"type": "ellipse", "center": [20, 24, 0], "width": 20, "height": 10, "rotation": 0}
    write_bdsa(tmp_path / "in", [circle, {**ellipse, "group": "White Matter"}])
    labels = bdsa_labels(tmp_path / "in", tmp_path / "out")
    assert np.count_nonzero(labels == 2) == pytest.approx(math.pi * 36, rel=0.05)
    assert np.count_nonzero(labels == 3) == pytest.approx(math.pi * 50, rel=0.05)


def test_annotations_are_drawn_at_the_tiles_resolution_and_the_regions_place(
    tmp_path: Path,
) -> None:
    # The image is at 0.5 um of a slide at 0.25 um, so 8 of the slide's pixels are 2 at 1 um.
    write_bdsa(tmp_path / "in", [square("Gray Matter", 1000, 1008)])
    header = "image,mpp,x,y,base_mpp,group\n"
    rows = "a,0.5,996,1000,0.25,one\nb,0.5,1000,1000,0.25,two\n"
    (tmp_path / "in" / "regions.csv").write_text(header + rows)
    tiles = TileSettings(tile_size_px=16, mpp=1.0)
    labels = bdsa_labels(tmp_path / "in", tmp_path / "out", tiles=tiles, source_mpp=None)
    expected = np.zeros((16, 16), np.uint8)
    expected[0:2, 1:3] = 2
    np.testing.assert_array_equal(labels, expected)


def test_regions_of_a_slide_share_its_annotations_and_its_fold(tmp_path: Path) -> None:
    write_bdsa(tmp_path / "in", [square("Gray Matter", 0, 20)], names=("a", "b", "c"))
    for name in ("b", "c"):
        (tmp_path / "in" / "annotations" / f"{name}.json").unlink()
    rows = "image,group,annotation\na.png,slide 1,a\nb.png,slide 1,a.json\nc,slide 2,a\n"
    (tmp_path / "in" / "regions.csv").write_text(rows)
    prepare_bdsa(tmp_path / "in", tmp_path / "out", bdsa_settings())
    found = {row["img_id"]: row["fold"] for row in folds(tmp_path / "out")}
    assert found["a"] == found["b"] != found["c"]


def test_folds_of_regions_csv_are_kept(tmp_path: Path) -> None:
    write_bdsa(tmp_path / "in", [square("Gray Matter", 0, 20)], names=("a", "b", "c"))
    (tmp_path / "in" / "regions.csv").write_text("image,fold\na,1\nb,0\nc,-1\n")
    prepare_bdsa(tmp_path / "in", tmp_path / "out", bdsa_settings())
    assert [row["fold"] for row in folds(tmp_path / "out")] == ["1", "0", "-1"]


def test_a_share_of_the_slides_is_drawn_for_testing(tmp_path: Path) -> None:
    write_bdsa(tmp_path / "in", [square("Gray Matter", 0, 20)], names=tuple("abcde"))
    prepare_bdsa(tmp_path / "in", tmp_path / "out", bdsa_settings(test_share=0.4))
    assert [row["fold"] for row in folds(tmp_path / "out")].count("-1") == 2


@pytest.mark.parametrize(
    "document",
    [
        {"name": "x", "elements": [square("Gray Matter", 0, 8)]},
        {"annotation": {"elements": [square("Gray Matter", 0, 8)]}},
        [{"annotation": {"elements": [square("Gray Matter", 0, 8)]}}],
        {"elements": [{**square("", 0, 8), "label": {"value": "grey_matter"}}]},
        {"annotation": {"name": "Gray Matter", "elements": [square("", 0, 8)]}},
    ],
    ids=["bare", "document", "list", "label", "name of the document"],
)
def test_every_form_of_an_export_is_read(tmp_path: Path, document: object) -> None:
    write_bdsa(tmp_path / "in", [square("Gray Matter", 0, 8)])
    (tmp_path / "in" / "annotations" / "a.json").write_text(json.dumps(document))
    assert (bdsa_labels(tmp_path / "in", tmp_path / "out")[:8, :8] == 2).all()


def test_unknown_labels_are_refused_by_name(tmp_path: Path) -> None:
    write_bdsa(tmp_path / "in", [square("Gray Matter", 0, 9), square("Artefact", 3, 6)])
    refuse_to_draw(tmp_path / "in", tmp_path / "out", AnnotationError, "'Artefact' (2)")


def test_renamed_labels_are_drawn_unlabelled_or_not_at_all(tmp_path: Path) -> None:
    elements = [square("GM", 0, 20), square("Artefact", 3, 6), square("ROI", 0, 30)]
    write_bdsa(tmp_path / "in", elements)
    rename = ("GM=Gray Matter", "artefact=unlabelled", "ROI=ignore")
    labels = bdsa_labels(tmp_path / "in", tmp_path / "out", rename=rename)
    assert (labels[1, 1], labels[4, 4], labels[25, 25]) == (2, 0, 0)


def test_a_renaming_to_an_unknown_class_is_refused(tmp_path: Path) -> None:
    write_bdsa(tmp_path / "in", [square("Gray Matter", 0, 9)])
    refuse_to_draw(
        tmp_path / "in", tmp_path / "out", SettingsError, "OLD=NEW", rename=("GM=Grey Stuff",)
    )


def test_uncovered_pixels_are_background_only_when_asked(tmp_path: Path) -> None:
    elements = [square("Gray Matter", 0, 20), square("Artefact", 3, 6)]
    write_bdsa(tmp_path / "in", elements)
    rename = ("Artefact=unlabelled",)
    labels = bdsa_labels(tmp_path / "in", tmp_path / "one", rename=rename)
    assert (labels[4, 4], labels[25, 25]) == (0, 0)
    labels = bdsa_labels(tmp_path / "in", tmp_path / "two", rename=rename, uncovered="background")
    assert (labels[4, 4], labels[25, 25]) == (0, 1)


def test_elements_without_area_are_left_out_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {"type": "polyline", "points": [[0, 0, 0], [9, 9, 0]], "group": "Gray Matter"}
    point = {"type": "point", "center": [3, 3, 0]}
    write_bdsa(tmp_path / "in", [square("Gray Matter", 0, 9), line, point])
    prepare_bdsa(tmp_path / "in", tmp_path / "out", bdsa_settings())
    output = capsys.readouterr().out
    assert "open polyline (2), point (2)" in output


def test_a_closed_polyline_of_two_points_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mistake = {**square("White Matter", 0, 9), "points": [[0, 0, 0], [9, 9, 0]]}
    hole = [[4, 4, 0], [5, 5, 0]]
    elements = [square("Gray Matter", 0, 9, holes=[hole]), mistake]
    write_bdsa(tmp_path / "in", elements)
    labels = bdsa_labels(tmp_path / "in", tmp_path / "out")
    assert (labels[:9, :9] == 2).all()
    output = "".join(capsys.readouterr().out.split())
    assert "closedpolylinewith2points,'WhiteMatter',element2ofa.json(1)" in output


def test_bdsas_tiles_are_as_bcss_by_default() -> None:
    assert BdsaSettings().tiles == BcssSettings().tiles


def test_regions_that_no_element_reaches_are_warned_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bdsa(tmp_path / "in", [square("Gray Matter", 0, 9)], names=("a", "b", "c"))
    (tmp_path / "in" / "regions.csv").write_text("image,x\na,0\nb,0\nc,500\n")
    prepare_bdsa(tmp_path / "in", tmp_path / "out", bdsa_settings())
    assert "1 regions, such as c," in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[1]", '{"elements": 3}', '{"type": "FeatureCollection"}'])
def test_other_json_is_refused_by_its_file(tmp_path: Path, text: str) -> None:
    write_bdsa(tmp_path / "in", [square("Gray Matter", 0, 9)])
    (tmp_path / "in" / "annotations" / "a.json").write_text(text)
    refuse_to_draw(tmp_path / "in", tmp_path / "out", AnnotationError, "a.json")


@pytest.mark.parametrize(
    ("table", "values"),
    [
        ("name\na\nb\n", ("image",)),
        ("image\na\n", ("1 names", "'b'")),
        ("image,mpp\na,half\nb,1\n", ("mpp", "'half'")),
        ("image,mpp\na,-1\nb,1\n", (-1.0, "--source-mpp")),
        ("image,annotation\na,other\nb,b\n", ("other.json",)),
    ],
)
def test_mistakes_in_regions_csv_are_named(
    tmp_path: Path, table: str, values: tuple[object, ...]
) -> None:
    write_bdsa(tmp_path / "in", [square("Gray Matter", 0, 9)])
    (tmp_path / "in" / "regions.csv").write_text(table)
    refuse_to_draw(tmp_path / "in", tmp_path / "out", SourceError, *values)


def test_images_without_known_resolution_are_refused(tmp_path: Path) -> None:
    write_bdsa(tmp_path / "in", [square("Gray Matter", 0, 9)])
    refuse_to_draw(tmp_path / "in", tmp_path / "out", SourceError, "--source-mpp", source_mpp=None)


# The command line


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
    main()


def test_the_command_prepares_with_its_options_and_prints_the_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_crag(tmp_path / "in")
    out = tmp_path / "out"
    run(monkeypatch, "prepare", "crag", tmp_path / "in", out, "--tile-size-px", SIDE)
    assert "50.00%" in capsys.readouterr().out
    assert json.loads((out / "settings.json").read_text())["tiles"]["tile_size_px"] == SIDE


def test_the_command_ends_a_mistake_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "prepare", "bdsa", tmp_path, tmp_path / "out")
    told = str(ended.value)
    assert told.startswith(f"error: {tmp_path} ")
    assert "images" in told
    assert "\n" not in told
