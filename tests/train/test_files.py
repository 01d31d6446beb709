import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tests.support.errors import raises
from train.errors import DestinationError, StorageError
from train.files import null_for_nan, refuse_existing, whole_file, whole_folder, write_json

DISK_ERRORS = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EROFS, "Read-only file system"),
    SafetensorError("I/O error: No space left on device (os error 28)"),
]


def write_and_fail(path: Path, error: Exception) -> None:
    with whole_file(path) as new:
        new.write_text("half")
        raise error


@pytest.mark.parametrize("error", DISK_ERRORS, ids=str)
def test_a_disk_that_cannot_be_written_keeps_the_file_of_before(tmp_path: Path, error: Exception):
    path = tmp_path / "scores.json"
    path.write_text("before")
    with raises(StorageError, path):
        write_and_fail(path, error)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]


def test_a_folder_that_is_a_file_is_told(tmp_path: Path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "scores.json"
    with raises(StorageError, path, "Not a directory"), whole_file(path) as new:
        new.write_text("text")


def test_a_folder_that_is_missing_is_told(tmp_path: Path):
    path = tmp_path / "missing" / "scores.json"
    with raises(StorageError, path, "No such file"), whole_file(path) as new:
        new.write_text("text")


def test_a_file_that_is_missing_elsewhere_is_our_own_mistake(tmp_path: Path):
    with raises(FileNotFoundError, "other"), whole_file(tmp_path / "scores.json"):
        (tmp_path / "data" / "other").read_text()
    assert not list(tmp_path.iterdir())


def test_an_error_that_is_no_users_passes_and_leaves_nothing(tmp_path: Path):
    with raises(OSError, "Bad file descriptor"):
        write_and_fail(tmp_path / "scores.json", OSError(errno.EBADF, "Bad file descriptor"))
    assert not list(tmp_path.iterdir())


def fill_and_fail(folder: Path, error: BaseException) -> None:
    with whole_folder(folder) as new:
        (new / "inside").mkdir()
        (new / "inside" / "tile.png").touch()
        raise error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_folder_that_could_not_be_filled_leaves_nothing(tmp_path: Path, error: BaseException):
    kind = StorageError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(kind):
        fill_and_fail(tmp_path / "new" / "data", error)
    assert not list((tmp_path / "new").iterdir())


def test_a_whole_folder_never_replaces_one_that_holds_something(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").touch()
    with raises(StorageError, tmp_path / "data"), whole_folder(tmp_path / "data"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "mine.txt"]


@pytest.mark.parametrize("is_taken", [True, False])
def test_only_a_place_that_holds_something_is_refused(tmp_path: Path, is_taken: bool):
    if is_taken:
        (tmp_path / "mine.txt").touch()
        with raises(DestinationError, tmp_path):
            refuse_existing(tmp_path)
        with raises(DestinationError, "mine.txt"):
            refuse_existing(tmp_path / "mine.txt")
    else:
        refuse_existing(tmp_path)
        refuse_existing(tmp_path / "new")


def test_a_file_has_the_mode_that_the_umask_gives_whatever_the_library_sets(tmp_path: Path):
    with whole_file(tmp_path / "weights.safetensors") as new:
        save_file({"weight": torch.zeros(1)}, new)
        assert new.stat().st_mode & 0o777 == 0o600, "safetensors' own, which this test is about"
    (tmp_path / "plain").touch()
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes["weights.safetensors"] == modes["plain"]


def test_a_file_is_written_where_modes_cannot_be_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    write_json(tmp_path / "run.json", {})
    assert (tmp_path / "run.json").read_text() == "{}\n"


def test_a_run_can_be_read_by_who_may_read_other_files(toy_run: Path, tmp_path: Path):
    (tmp_path / "plain").touch()
    files = [path for path in toy_run.rglob("*") if path.is_file()]
    assert len(files) > 2
    assert {path.stat().st_mode for path in files} == {(tmp_path / "plain").stat().st_mode}


def test_a_score_that_is_not_known_is_null_in_json(tmp_path: Path):
    scores = {"dice/a": 0.5, "dice/b": float("nan"), "folds": ({"iou/b": float("nan")}, 1)}
    write_json(tmp_path / "scores.json", null_for_nan(scores))
    text = (tmp_path / "scores.json").read_text()
    expected = {"dice/a": 0.5, "dice/b": None, "folds": [{"iou/b": None}, 1]}
    assert json.loads(text, parse_constant=pytest.fail) == expected


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_leads_to_the_folder_that_is_written(exists: bool, tmp_path: Path):
    if exists:
        (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    refuse_existing(tmp_path / "data")
    with whole_folder(tmp_path / "data") as new:
        (new / "file").write_text("text")
    assert (tmp_path / "data").is_symlink()
    assert (tmp_path / "disk" / "file").read_text() == "text"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "disk"]


@pytest.mark.parametrize("path", [".", "../here", "sub/.."])
def test_the_current_folder_is_no_place_to_write(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with raises(DestinationError, path):
        refuse_existing(Path(path))
