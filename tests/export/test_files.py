import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from export.files import replaced_whole, staging_folder, uninterrupted
from train.errors import FocalPathError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file that says "old"."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("old")
    return folder


def _replace(folder: Path) -> None:
    with replaced_whole(folder) as new:
        (new / "file").write_text("new")


def _before_rename(
    monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]
) -> list[int]:
    """Act before the rename of this number."""
    rename, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        calls.append(1)
        if len(calls) == number:
            act()
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    return calls


def _refuse() -> None:
    raise PermissionError("no")


def test_a_folder_is_replaced_whole(folder: Path) -> None:
    (folder / "other").write_text("gone")
    _replace(folder)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("file", "new")]
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("number", [1, 2])
def test_a_rename_that_fails_leaves_the_old_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    _before_rename(monkeypatch, number, _refuse)
    with pytest.raises(PermissionError):
        _replace(folder)
    assert (folder / "file").read_text() == "old"
    assert list(folder.parent.iterdir()) == [folder]


def test_ctrl_c_between_the_renames_waits_and_tells_that_the_folder_is_new(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _before_rename(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="is the new one"):
        _replace(folder)
    assert (folder / "file").read_text() == "new"
    assert list(folder.parent.iterdir()) == [folder]


def test_ctrl_c_before_the_renames_leaves_the_old_folder_and_says_nothing(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, replaced_whole(folder):
        signal.raise_signal(signal.SIGINT)
    assert str(caught.value) == ""
    assert (folder / "file").read_text() == "old"
    assert list(folder.parent.iterdir()) == [folder]


def test_sigterm_is_held_back_for_its_own_handler() -> None:
    seen: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("terminated"))
    try:
        with uninterrupted("done"):
            signal.raise_signal(signal.SIGTERM)
            seen.append("done")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == ["done", "terminated"]


def test_a_full_disk_is_told_with_its_folder_and_what_to_do(folder: Path) -> None:
    message = (
        f"no space left on the disk of {folder.parent}; nothing was changed there. Free some space"
    )
    with pytest.raises(FocalPathError, match=message), replaced_whole(folder):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (folder / "file").read_text() == "old"
    assert list(folder.parent.iterdir()) == [folder]


def test_another_failure_of_the_disk_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), staging_folder(tmp_path, ".new-"):
        raise PermissionError("no")
    assert list(tmp_path.iterdir()) == []
