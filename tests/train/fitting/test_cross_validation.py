"""A model per fold, and the scores of all images."""

import csv
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.support.errors import raises
from tests.support.toy_data import changed, toy_settings
from train.data.folder import TileFolder, read_tile_folder
from train.errors import DatasetError, FocalPathError, RunError, SettingsError, StorageError
from train.fitting import cross_validation
from train.fitting.cross_validation import (
    CrossValidation,
    assign,
    cross_validate,
    print_folds,
)
from train.fitting.run_lock import only_run
from train.model.checkpoint import read_card
from train.settings import LabelClass


@pytest.fixture(scope="module")
def grouped(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy data with two images of each patient."""
    data = Path(shutil.copytree(toy_data, tmp_path_factory.mktemp("grouped") / "data"))
    lines = (data / "folds.csv").read_text().splitlines()
    rows = [f"{line},{index // 2}" for index, line in enumerate(lines[1:])]
    (data / "folds.csv").write_text("\n".join([f"{lines[0]},group", *rows]))
    return data


SETTINGS = toy_settings(optimization={"epochs": 1})


@pytest.fixture(scope="module")
def validated(
    grouped: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, CrossValidation]:
    run = tmp_path_factory.mktemp("folds") / "run"
    return run, cross_validate(SETTINGS, grouped, run, 3)


@pytest.fixture
def copied(validated: tuple[Path, CrossValidation], tmp_path: Path) -> Path:
    """The finished run, to be changed."""
    return Path(shutil.copytree(validated[0], tmp_path / "run"))


def test_the_spread_is_the_sample_deviation_of_the_folds_that_have_the_class():
    folds = tuple({"dice/A": value} for value in (0.5, math.nan, 0.7, 0.9))
    found = CrossValidation((), folds, {})
    assert found.spread("dice/A") == pytest.approx((0.7, 0.2))
    assert CrossValidation((), folds[:2], {}).spread("dice/A") == (0.5, 0.0)
    nowhere = CrossValidation((), ({"dice/A": math.nan},), {})
    assert all(math.isnan(value) for value in nowhere.spread("dice/A"))


def test_images_of_a_patient_share_a_fold(grouped: Path):
    folds = assign(read_tile_folder(grouped), 3, seed=0)
    assert len(folds) == 10
    assert set(folds.values()) == {0, 1, 2}
    assert all(folds[f"tile{n}"] == folds[f"tile{n + 1}"] for n in range(0, 10, 2))


@pytest.mark.parametrize("num_folds", [2, 3])
def test_any_fold_but_that_of_the_test_images_takes_part(
    grouped: Path, tmp_path: Path, num_folds: int
):
    data = Path(shutil.copytree(grouped, tmp_path / "data"))
    folds = data / "folds.csv"
    folds.write_text(folds.read_text().replace("tile1,1,", "tile1,-2,"))
    folder = read_tile_folder(data)
    assigned = assign(folder, num_folds, seed=0)
    open_tiles = [*folder.tiles["training"], *folder.tiles["validation"]]
    assert assigned.keys() == {tile.tile_id for tile in open_tiles}
    assert set(assigned.values()) == set(range(num_folds))


def test_own_folds_are_taken_where_they_are_as_many(toy_data: Path):
    folder = read_tile_folder(toy_data)
    assert assign(folder, 2, seed=0) == {f"tile{n}": int(n < 8) for n in range(10)}


def test_folds_by_image_are_warned_about(
    toy_data: Path, grouped: Path, capsys: pytest.CaptureFixture[str]
):
    assert set(assign(read_tile_folder(grouped), 5, seed=0).values()) == set(range(5))
    assert capsys.readouterr().out == ""
    assign(read_tile_folder(toy_data), 5, seed=0)
    assert "group" in capsys.readouterr().out


def test_the_fold_of_each_image_is_drawn_by_the_seed_and_written(
    grouped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cross_validation, "fit", None)
    with pytest.raises(TypeError, match="not callable"):
        cross_validate(changed(SETTINGS, optimization={"seed": 1}), grouped, tmp_path / "run", 3)
    with (tmp_path / "run" / "folds.csv").open(newline="") as file:
        written = {row["img_id"]: int(row["fold"]) for row in csv.DictReader(file)}
    folder = read_tile_folder(grouped)
    assert written == assign(folder, 3, 1) != assign(folder, 3, 0)


def test_sam_paths_own_list_of_folds_is_taken(grouped: Path, tmp_path: Path):
    data = Path(shutil.copytree(grouped, tmp_path / "data"))
    (data / "folds.csv").rename(data / "cv.csv")
    assert assign(read_tile_folder(data), 3, seed=0) == assign(read_tile_folder(grouped), 3, seed=0)


def test_a_fold_that_lacks_a_class_is_told_before_any_is_trained(grouped: Path, tmp_path: Path):
    data = Path(shutil.copytree(grouped, tmp_path / "data"))
    folds = assign(read_tile_folder(data), 3, seed=0)
    for name, fold in folds.items():
        if fold != 2:
            path = data / "mask" / f"{name}.png"
            with Image.open(path) as mask:
                labels = np.asarray(mask)
            Image.fromarray(np.where(labels == 4, 0, labels).astype(np.uint8)).save(path)
    with raises(DatasetError, "fold 2 of 3", "Necrosis", "--folds"):
        cross_validate(SETTINGS, data, tmp_path / "run", 3)
    assert not (tmp_path / "run").exists()


def test_each_fold_leaves_a_checkpoint_and_all_images_are_scored(
    validated: tuple[Path, CrossValidation], grouped: Path
):
    run, result = validated
    assert all((run / f"fold{n}" / "model.safetensors").is_file() for n in range(3))
    saved = json.loads((run / "folds.json").read_text(), parse_constant=pytest.fail)
    assert saved["pooled"]["dice/mean"] == result.pooled["dice/mean"]
    confusions = [
        np.array(json.loads((run / f"fold{n}" / "cross_validation.json").read_text())["confusion"])
        for n in range(3)
    ]
    total = np.sum(confusions, axis=0)
    dice = 2 * total[0, 0] / (total[0].sum() + total[:, 0].sum())
    assert result.pooled["dice/Tumor"] == pytest.approx(dice, abs=1e-6)
    masks = [np.asarray(Image.open(grouped / "mask" / f"tile{n}.png")) for n in range(10)]
    assert total.sum() == np.count_nonzero(masks)
    for fold, scores in enumerate(result.folds):
        metrics = read_card(run / f"fold{fold}").metrics
        assert scores["dice/mean"] == pytest.approx(metrics["dice/mean"], abs=1e-5)
    assert saved["folds"] == list(result.folds)
    assert len(saved["folds"]) == 3
    for name in result.pooled:
        found = (saved["mean"][name], saved["standard_deviation"][name])
        assert found == result.spread(name)


def test_a_finished_fold_is_not_trained_again(
    validated: tuple[Path, CrossValidation], grouped: Path, monkeypatch: pytest.MonkeyPatch
):
    run, result = validated
    monkeypatch.setattr(cross_validation, "fit", None)
    assert cross_validate(SETTINGS, grouped, run, 3).pooled == result.pooled


def test_a_fold_that_has_begun_goes_on_and_learns_from_no_image_that_it_is_scored_on(
    validated: tuple[Path, CrossValidation],
    grouped: Path,
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    for fold, damaged in enumerate(("", "{}", "[]")):
        (copied / f"fold{fold}" / "cross_validation.json").write_text(damaged)
    (copied / "fold2" / "last.ckpt").unlink()
    asked: list[tuple[str, bool, bool]] = []
    folds = assign(read_tile_folder(grouped), 3, seed=0)

    def spy(_: object, part: TileFolder, fold: Path, *, resume: bool, overwrite: bool) -> None:
        asked.append((fold.name, resume, overwrite))
        known, held_out = (
            {tile.tile_id for tile in part.tiles[split]} for split in ("training", "validation")
        )
        assert held_out == {name for name in folds if f"fold{folds[name]}" == fold.name}
        assert known == folds.keys() - held_out

    monkeypatch.setattr(cross_validation, "fit", spy)
    assert cross_validate(SETTINGS, grouped, copied, 3) == validated[1]
    assert asked == [("fold0", True, False), ("fold1", True, False), ("fold2", False, True)]


def test_a_fold_of_other_settings_is_not_taken_for_this_one(
    validated: tuple[Path, CrossValidation], grouped: Path
):
    with raises(RunError, "fold0"):
        cross_validate(toy_settings(), grouped, validated[0], 3)


def test_a_refusal_leaves_the_list_of_folds_as_it_was(
    validated: tuple[Path, CrossValidation], grouped: Path
):
    run, _ = validated
    before = (run / "folds.csv").read_bytes()
    with raises(RunError, "fold0"):
        cross_validate(SETTINGS, grouped, run, 2)
    assert (run / "folds.csv").read_bytes() == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_folds_that_another_process_trains_are_left_alone(
    copied: Path, grouped: Path, overwrite: bool
):
    for done in copied.glob("fold*/cross_validation.json"):  # the other has just begun
        done.unlink()
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    with only_run(copied, is_first=True):
        with raises(RunError, copied):
            cross_validate(SETTINGS, grouped, copied, 2, overwrite=overwrite)
        assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(("variable", "number"), [("NODE_RANK", "1"), ("GROUP_RANK", "1")])
def test_the_process_of_another_node_trains_with_the_first(
    copied: Path, grouped: Path, monkeypatch: pytest.MonkeyPatch, variable: str, number: str
):
    monkeypatch.setenv(variable, number)
    with only_run(copied, is_first=True):
        cross_validate(SETTINGS, grouped, copied, 3)


def test_no_earlier_fold_counts_after_an_interrupted_overwrite(
    grouped: Path,
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    asked: list[tuple[str, bool]] = []

    def interrupted(_: object, __: object, fold: Path, *, resume: bool, overwrite: bool) -> None:
        asked.append((fold.name, resume))
        if len(asked) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(cross_validation, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cross_validate(SETTINGS, grouped, copied, 3, overwrite=True)
    assert not (copied / "folds.json").exists()
    cross_validate(SETTINGS, grouped, copied, 3)
    assert asked == [(f"fold{n}", False) for n in (0, 0, 1, 2)]


def test_folds_that_start_from_a_run_are_warned_about(
    validated: tuple[Path, CrossValidation],
    grouped: Path,
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    earlier = validated[0] / "fold0"
    monkeypatch.setattr(cross_validation, "fit", lambda *_, **__: None)
    settings = changed(SETTINGS, weights={"from_run": str(earlier)})
    cross_validate(settings, grouped, copied, 3, overwrite=True)
    assert f"{earlier}, which was trained on images of data" in capsys.readouterr().out
    cross_validate(SETTINGS, grouped, copied, 3, overwrite=True)
    assert "every fold starts from" not in capsys.readouterr().out


def test_folds_that_started_from_different_weights_are_told(
    grouped: Path,
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(cross_validation, "fit", None)
    cross_validate(SETTINGS, grouped, copied, 3)
    assert "different weights" not in capsys.readouterr().out
    card = json.loads((copied / "fold1" / "model.json").read_text())
    card["origins"] = [
        {"part": "whole model", "name": "the run a", "file": "a", "sha256": "0", "licence": "x"}
    ]
    (copied / "fold1" / "model.json").write_text(json.dumps(card))
    cross_validate(SETTINGS, grouped, copied, 3)
    assert "different weights" in capsys.readouterr().out


def test_a_score_that_no_image_has_is_no_number_in_json(
    grouped: Path,
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    for path in copied.glob("fold*/cross_validation.json"):
        content = json.loads(path.read_text())
        confusion = np.array(content["confusion"])
        confusion[3] = confusion[:, 3] = 0
        path.write_text(json.dumps({**content, "confusion": confusion.tolist()}))
    monkeypatch.setattr(cross_validation, "fit", None)
    cross_validate(SETTINGS, grouped, copied, 3)
    saved = json.loads((copied / "folds.json").read_text(), parse_constant=pytest.fail)
    for scores in (*saved["folds"], *(saved[name] for name in ("pooled", "mean"))):
        assert scores["dice/Necrosis"] is None


def test_a_place_that_cannot_be_written_is_told(grouped: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with raises(StorageError, tmp_path / "file"):
        cross_validate(SETTINGS, grouped, tmp_path / "file" / "run", 3)


def test_the_table_has_the_pooled_score_and_the_spread_of_each_class(
    capsys: pytest.CaptureFixture[str],
):
    folds = [
        {"dice/A": 0.1, "iou/A": 0.3, "dice/mean": 0.5, "iou/mean": 0.7},
        {"dice/A": 0.3, "iou/A": 0.5, "dice/mean": 0.7, "iou/mean": 0.9},
    ]
    pooled = {"dice/A": 0.11, "iou/A": 0.12, "dice/mean": 0.13, "iou/mean": 0.14}
    print_folds(CrossValidation((LabelClass(name="A", color="#ff0000"),), tuple(folds), pooled))
    out = capsys.readouterr().out
    assert re.findall(r"(?:Class|Dice|IoU)(?:, \w+)?", out) == [
        "Class",
        "Dice, pooled",
        "Dice, folds",
        "IoU, pooled",
        "IoU, folds",
    ]
    rows = [re.findall(r"[\d.]+", line) for line in out.splitlines() if "±" in line]
    assert rows == [
        ["0.1100", "0.2000", "0.1414", "0.1200", "0.4000", "0.1414"],
        ["0.1300", "0.6000", "0.1414", "0.1400", "0.8000", "0.1414"],
    ]


def test_an_imported_run_to_start_from_knew_unknown_images(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(cross_validation, "read_card", lambda _: SimpleNamespace(data=None))
    cross_validation._warn_of_start(Path("imported"))
    assert "imported, which was trained on unknown images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("num_folds", "kind", "named"),
    [(1, SettingsError, "--folds is 1"), (6, DatasetError, "5 patients")],
)
def test_folds_that_cannot_be_are_refused(
    num_folds: int, kind: type[FocalPathError], named: str, grouped: Path, tmp_path: Path
):
    with raises(kind, named):
        cross_validate(SETTINGS, grouped, tmp_path / "run", num_folds)
    assert not (tmp_path / "run").exists()
