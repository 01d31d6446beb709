from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.errors import raises
from tests.support.published_data import SIDE, folds, write_crag
from train.data.convert.crag import CragSettings, prepare_crag
from train.data.convert.layout import TileSettings
from train.data.masks import read_mask
from train.errors import (
    SourceError,
)


def crag_settings(**tiles: float) -> CragSettings:
    return CragSettings(tiles=TileSettings(**{"tile_size_px": SIDE, "mpp": 0.55, **tiles}))


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
