from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.errors import raises
from tests.support.published_data import SIDE, folds, write_crag
from train.data.convert.crag import CragSettings, prepare_crag
from train.data.convert.layout import TileSettings
from train.data.masks import read_mask
from train.errors import SourceError


def prepare(source: Path, **tiles: float) -> Path:
    settings = TileSettings(**{"tile_size_px": SIDE, "mpp": 0.55, **tiles})
    prepare_crag(source, source.parent / "out", CragSettings(tiles=settings))
    return source.parent / "out"


def test_numbered_crag_glands_become_one_class(tmp_path: Path) -> None:
    write_crag(tmp_path / "in")
    labels = read_mask(prepare(tmp_path / "in") / "mask" / "train_1.png", 2)
    assert [labels[0, 0], labels[SIDE // 2, 0], labels[-1, 0]] == [2, 1, 2]


def test_crag_images_of_valid_are_for_testing(tmp_path: Path) -> None:
    write_crag(tmp_path / "in", num_train=4, num_test=2)
    rows = {row["img_id"]: int(row["fold"]) for row in folds(prepare(tmp_path / "in"))}
    assert {name for name, fold in rows.items() if fold == -1} == {"test_1", "test_2"}
    assert {0} < {fold for name, fold in rows.items() if name.startswith("train")}


def test_crag_masks_with_more_than_255_glands_are_read(tmp_path: Path) -> None:
    write_crag(tmp_path / "in")
    glands = np.full((SIDE, SIDE), 256, np.uint16)
    Image.fromarray(glands).save(tmp_path / "in" / "train" / "Annotation" / "train_1.png")
    assert (read_mask(prepare(tmp_path / "in") / "mask" / "train_1.png", 2) == 2).all()


def test_spare_crag_masks_are_left_out_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_crag(tmp_path / "in", num_test=2)
    (tmp_path / "in" / "valid" / "Images" / "test_2.png").unlink()
    out = prepare(tmp_path / "in")
    assert "1 masks" in capsys.readouterr().out
    assert "test_2" not in {row["img_id"] for row in folds(out)}


def test_a_crag_image_without_its_mask_is_refused(tmp_path: Path) -> None:
    write_crag(tmp_path / "in")
    (tmp_path / "in" / "train" / "Annotation" / "train_2.png").unlink()
    with raises(SourceError, "lacks 1 masks", "train_2.png"):
        prepare(tmp_path / "in")


def test_a_folder_that_is_not_crag_is_refused(tmp_path: Path) -> None:
    with raises(SourceError, tmp_path, "train"):
        prepare(tmp_path)
