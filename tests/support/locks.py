"""File systems without locks, such as some network shares."""

import fcntl
import os

import pytest


def break_locks(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Have the system answer every request for a lock with this error."""

    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
