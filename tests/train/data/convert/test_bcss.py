from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.errors import raises
from tests.support.published_data import SIDE, folds, write_bcss
from train.data.convert.bcss import CODES, BcssSettings, prepare_bcss
from train.data.convert.layout import TileSettings
from train.data.folder import read_tile_folder
from train.data.images import read_image
from train.data.masks import read_mask
from train.errors import (
    DestinationError,
    ImageFileError,
    MaskError,
    ScaleError,
    SourceError,
)


def bcss_settings(**tiles: float) -> BcssSettings:
    return BcssSettings(tiles=TileSettings(**{"tile_size_px": SIDE, "num_folds": 2, **tiles}))


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
    with raises(ImageFileError, mask.name, "32 x 31", "32 x 32"):
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
