import errno
import os
from pathlib import Path

import pytest

from serve.contract.file_lock import file_lock
from serve.inference.trial import HOME_VARIABLE, Trial, shared_trials
from tests.support.errors import raises
from tests.support.locks import break_locks

_NO_LOCKS = pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with file_lock(lock, wait=False) as first, file_lock(lock, wait=False) as second:
        assert (first, second) == (True, False)
    with file_lock(lock, wait=True) as free:
        assert free


@_NO_LOCKS
def test_where_the_file_system_has_no_locks_nothing_is_held(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_locks(monkeypatch, code)
    for wait in (False, True):
        with (
            file_lock(tmp_path / "lock", wait=wait) as first,
            file_lock(tmp_path / "lock", wait=wait) as second,
        ):
            assert (first, second) == (True, True)


def test_another_failure_of_a_lock_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_locks(monkeypatch, errno.EIO)
    with raises(OSError, os.strerror(errno.EIO)), file_lock(tmp_path / "lock", wait=True):
        pytest.fail("not locked")


@_NO_LOCKS
def test_providers_are_tried_also_where_the_temporary_folder_has_no_locks(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    break_locks(monkeypatch, code)
    found = [Trial(provider="cpu", precision="fp32", is_proven=True, seconds=0.1)]
    assert shared_trials(["key"], lambda: found) == found
