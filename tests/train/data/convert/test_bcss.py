from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    FocalPathError,
    ImageFileError,
    MaskError,
    ScaleError,
    SourceError,
)

PATIENTS = ["TCGA-A1-A0SK", "TCGA-A2-A04P"]
REGION = "TCGA-A1-A0SK-DX1_xmin45749_ymin25055_MPP-0.2500"


def prepare(source: Path, source_mpp: float | None = None, **tiles: float) -> Path:
    settings = TileSettings(**{"tile_size_px": SIDE, "num_folds": 2, **tiles})  # type: ignore[arg-type]
    out = source.parent / "out"
    prepare_bcss(source, out, BcssSettings(tiles=settings, source_mpp=source_mpp))
    return out


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two regions of tumor."""
    write_bcss(tmp_path / "in", PATIENTS)
    return tmp_path / "in"


def test_bcss_codes_are_grouped_into_five_classes(tmp_path: Path) -> None:
    codes = np.repeat(np.arange(22, dtype=np.uint8)[None], 4, axis=0)
    write_bcss(tmp_path / "in", PATIENTS, codes)
    labels = read_mask(prepare(tmp_path / "in") / "mask" / f"{REGION}.png", 5)
    expected = [0, 1, 2, 3, 4, 5, 5, 0, 5, 5, 3, 3, 5, 5, 5, 5, 5, 5, 5, 1, 1, 5]
    assert labels[0, :22].tolist() == expected


def test_bcss_slides_of_the_published_institutes_are_for_testing(tmp_path: Path) -> None:
    others = ["TCGA-A1-A0SK", "TCGA-E9-A5FL", "TCGA-GI-A2C9"]
    test = [f"TCGA-{institute}-A000" for institute in ("E2", "EW", "GM", "LL", "OL", "S3")]
    write_bcss(tmp_path / "in", others + test)
    out = prepare(tmp_path / "in")
    assert {row["group"] for row in folds(out) if row["fold"] == "-1"} == set(test)
    folder = read_tile_folder(out)  # as training reads it
    assert [entry.name for entry in folder.classes][:2] == ["Tumor", "Stroma"]
    assert folder.mpp == 0.25
    assert all(folder.tiles.values())


def test_all_tiles_of_a_bcss_patient_share_a_fold(tmp_path: Path) -> None:
    patients = [f"TCGA-A{number}-AAAA" for number in range(4)]
    write_bcss(tmp_path / "in", patients, np.ones((40, 50), np.uint8))
    rows = folds(prepare(tmp_path / "in"))
    assert len(rows) == 4 * 4
    assert len({(row["group"], row["fold"]) for row in rows}) == 4


def test_bcss_tiles_overlap_at_the_end_rather_than_miss_pixels(tmp_path: Path) -> None:
    codes = np.arange(40 * 40).reshape(40, 40).astype(np.uint8) % 2 + 1
    write_bcss(tmp_path / "in", PATIENTS, codes)
    last = read_mask(prepare(tmp_path / "in") / "mask" / f"{REGION}_8_8.png", 5)
    np.testing.assert_array_equal(last, codes[8:, 8:])


def test_bcss_regions_smaller_than_a_tile_are_padded_unlabelled(tmp_path: Path) -> None:
    write_bcss(tmp_path / "in", PATIENTS, np.ones((20, 30), np.uint8))
    tile = read_tile_folder(prepare(tmp_path / "in")).tiles["training"][0]
    labels, image = read_mask(tile.mask, 5), read_image(tile.image)
    assert labels.shape == (SIDE, SIDE)
    assert (labels[:20, :30] == 1).all()
    assert labels.sum() == 20 * 30
    assert (image[20:] == 255).all()


def test_bcss_regions_are_resampled_from_the_mpp_in_their_name(source: Path) -> None:
    tile = read_tile_folder(prepare(source, mpp=0.5)).tiles["training"][0]
    assert np.count_nonzero(read_mask(tile.mask, 5)) == (SIDE // 2) ** 2


def test_bcss_tiles_without_enough_labels_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = np.ones((SIDE, 2 * SIDE), np.uint8)
    codes[:, SIDE + 4 :] = 0
    write_bcss(tmp_path / "in", PATIENTS, codes)
    out = prepare(tmp_path / "in", min_labelled_share=0.2)
    assert all(row["img_id"].endswith("_0_0") for row in folds(out))
    assert "2 of 4 tiles were left out" in capsys.readouterr().out


def test_unknown_bcss_codes_become_unlabelled_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = np.ones((SIDE, SIDE), np.uint8)
    codes[0, :3] = 37
    write_bcss(tmp_path / "in", PATIENTS, codes)
    tile = read_tile_folder(prepare(tmp_path / "in")).tiles["training"][0]
    assert np.count_nonzero(read_mask(tile.mask, 5) == 0) == 3
    assert "37 (6 pixels)" in capsys.readouterr().out


def write_codes(source: Path, codes: dict[str, int]) -> Path:
    (source / "meta").mkdir()
    table = source / "meta" / "gtruth_codes.tsv"
    rows = [f"{label}\t{code}" for label, code in codes.items()]
    table.write_text("\n".join(["label\tGT_code", *rows]) + "\n")
    return table


def test_a_bcss_code_table_of_this_release_is_accepted(source: Path) -> None:
    write_codes(source, {label: code for label, (code, _) in CODES.items()})
    assert len(folds(prepare(source))) == 2


def another_release(source: Path) -> None:
    write_codes(source, {"tumor": 2})


def a_mask_of_another_size(source: Path) -> None:
    Image.new("L", (SIDE, SIDE - 1)).save(max((source / "masks").iterdir()))


def a_mask_in_colour(source: Path) -> None:
    Image.new("RGB", (SIDE, SIDE)).save(min((source / "masks").iterdir()))


def a_damaged_image(source: Path) -> None:
    image = min((source / "rgbs_colorNormalized").iterdir())
    image.write_bytes(image.read_bytes()[:60])


def no_mask(source: Path) -> None:
    min((source / "masks").iterdir()).unlink()


def no_label(source: Path) -> None:
    write_bcss(source, PATIENTS, np.zeros((9, 9), np.uint8))


@pytest.mark.parametrize(
    ("damage", "kind", "values"),
    [
        (another_release, SourceError, ("gtruth_codes.tsv", "'tumor'", 2, 1)),
        (a_mask_of_another_size, ImageFileError, ("A2-A04P", "32 x 31", "32 x 32")),
        (a_mask_in_colour, MaskError, ("A1-A0SK", "RGB")),
        (a_damaged_image, ImageFileError, ("A1-A0SK",)),
        (no_mask, SourceError, ("masks lacks 1", "A1-A0SK")),
        (lambda source: write_bcss(source, ["slide-one"]), SourceError, ("slide-one",)),
        (lambda source: write_bcss(source, PATIENTS, mpp=""), ScaleError, ("--source-mpp",)),
        (no_label, MaskError, ("2 tiles", 0.0)),
        (lambda source: write_bcss(source, PATIENTS, mpp="_MPP-25"), ScaleError, (25, 20)),
        (lambda source: write_bcss(source, PATIENTS, mpp="_MPP-1.5"), ScaleError, ("6 times",)),
    ],
)
def test_bcss_that_is_wrong_is_refused_and_nothing_is_left(
    damage: Callable[[Path], Any],
    kind: type[FocalPathError],
    values: tuple[object, ...],
    source: Path,
) -> None:
    damage(source)
    with raises(kind, *values):
        prepare(source)
    assert [path.name for path in source.parent.iterdir()] == ["in"]


def test_bcss_names_without_mpp_take_it_as_an_option(tmp_path: Path) -> None:
    write_bcss(tmp_path / "in", PATIENTS, mpp="")
    assert len(folds(prepare(tmp_path / "in", source_mpp=0.25))) == 2


def test_enlarged_bcss_regions_are_warned_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bcss(tmp_path / "in", PATIENTS, mpp="_MPP-0.5000")
    prepare(tmp_path / "in")
    assert "2 regions" in capsys.readouterr().out


def test_an_existing_output_folder_is_refused_untouched(source: Path) -> None:
    out = source.parent / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with raises(DestinationError, out):
        prepare(source)
    assert (out / "mine.txt").read_text() == "precious"
