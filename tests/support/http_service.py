"""The real HTTP service in a process of its own, for tests."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support.ports import free_port

_TIMEOUT_S = 120.0
_START_ATTEMPTS = 3


@contextmanager
def running_service(bundle: Path, log: Path, **settings: str) -> Iterator[str]:
    """Start `python -m serve http` with FOCALPATH_<SETTING>, yield its URL once it is alive."""
    with service_process(bundle, log, python=None, **settings) as (url, _):
        yield url


@contextmanager
def service_process(
    bundle: Path, log: Path, *, python: Path | None = None, **settings: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """As `running_service`, with the process; it may have ended already when this is left.

    With another environment's `python` it runs beside the log, where it sees nothing of this one.
    """
    environment = {**os.environ, "FOCALPATH_BUNDLE": str(bundle)}
    environment |= {f"FOCALPATH_{name.upper()}": value for name, value in settings.items()}
    for _ in range(_START_ATTEMPTS):
        port = free_port()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(python or sys.executable), "-m", "serve", "http", "--port", str(port)],
                env=environment,
                cwd=log.parent if python else None,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        url = f"http://127.0.0.1:{port}"
        try:
            if _is_alive(process, url, log):
                yield url, process
                return
        finally:
            process.terminate()
            process.wait(timeout=_TIMEOUT_S)
    raise AssertionError(f"other processes took {_START_ATTEMPTS} ports before the service")


def wait_until_ready(url: str, *, status: int = 200) -> None:
    """Wait until /readyz answers with this status."""
    deadline = time.monotonic() + _TIMEOUT_S
    while (found := httpx.get(f"{url}/readyz")).status_code != status:
        assert time.monotonic() < deadline, f"{url}/readyz: {found.status_code} {found.text}"
        time.sleep(0.05)


def wait_for_workers(log: Path, count: int) -> None:
    """Wait until so many workers say in the log that they answer; `/readyz` asks only one."""
    deadline = time.monotonic() + _TIMEOUT_S
    while (text := log.read_text(encoding="utf-8")).count("answers requests now") < count:
        assert time.monotonic() < deadline, text
        time.sleep(0.05)


def _is_alive(process: subprocess.Popen[bytes], url: str, log: Path) -> bool:
    """Wait until the service is alive; False if its port was taken."""
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        if process.poll() is not None:
            text = log.read_text(encoding="utf-8")
            assert "Address already in use" in text, text
            return False
        assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
        try:
            if httpx.get(f"{url}/livez").is_success:
                return True
        except httpx.TransportError:
            time.sleep(0.05)
