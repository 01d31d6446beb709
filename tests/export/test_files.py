import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from export.errors import StorageError
from export.files import replaced_whole, staging_folder, uninterrupted
from tests.support.errors import raises


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
    raise PermissionError(errno.EACCES, "Permission denied")


def test_a_folder_is_replaced_whole(folder: Path) -> None:
    (folder / "other").write_text("gone")
    _replace(folder)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("file", "new")]
    assert list(folder.parent.iterdir()) == [folder]


def test_two_that_replace_a_folder_at_once_both_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second comes while the folder is away."""
    second = threading.Thread(target=_replace, args=(folder,))

    def at_once() -> None:
        second.start()
        second.join(0.3)  # as far as it gets

    _before_rename(monkeypatch, 2, at_once)
    _replace(folder)
    second.join()
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("file", "new")]
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("number", [1, 2])
def test_a_rename_that_fails_leaves_the_old_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    _before_rename(monkeypatch, number, _refuse)
    with raises(StorageError, folder.parent):
        _replace(folder)
    assert (folder / "file").read_text() == "old"
    assert list(folder.parent.iterdir()) == [folder]


def test_ctrl_c_between_the_renames_waits_and_tells_that_the_folder_is_new(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _before_rename(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGINT))
    with raises(KeyboardInterrupt, folder):
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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_cannot_be_written_is_named_and_nothing_changes(
    folder: Path, number: int
) -> None:
    reason = os.strerror(number)
    with raises(StorageError, folder.parent, reason), replaced_whole(folder):
        raise OSError(number, reason)
    assert (folder / "file").read_text() == "old"
    assert list(folder.parent.iterdir()) == [folder]


def test_another_error_of_the_operating_system_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(BrokenPipeError), staging_folder(tmp_path, ".new-"):
        raise BrokenPipeError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_replaces_another_has_the_mode_that_the_umask_gives(folder: Path) -> None:
    umask = os.umask(0o027)
    try:
        _replace(folder)
    finally:
        os.umask(umask)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert (folder / "file").stat().st_mode & 0o777 == 0o640
