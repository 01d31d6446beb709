"""The processes that open slides, while the service is being stopped."""

import subprocess
from collections.abc import Iterator

import pytest

from serve.service.slides.readers import _Process
from tests.support.meanwhile import before_call


@pytest.fixture
def process() -> Iterator[_Process]:
    process = _Process()
    process.start()
    yield process
    process.close()


@pytest.mark.parametrize("moment", ["kill", "wait"])
def test_a_process_may_be_closed_by_two_threads(
    process: _Process, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_call(monkeypatch, process._process, moment, process.close)
    process.close()
    assert process._process is None


@pytest.mark.parametrize("moment", ["poll", "recv_bytes"])
def test_who_waits_for_a_process_is_told_that_the_service_is_being_stopped(
    process: _Process, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_call(monkeypatch, process._connection, moment, process.close)
    with pytest.raises(EOFError, match="being stopped"):
        process.ask({"operation": "info"})


def test_what_a_process_said_may_be_gone_once_it_has_ended(
    process: _Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = process._process
    assert isinstance(running, subprocess.Popen)
    running.kill()
    monkeypatch.setattr(process, "start", lambda: None)
    before_call(monkeypatch, running, "wait", process.close)
    with pytest.raises(EOFError, match="being stopped"):
        process.ask({"operation": "info"})
