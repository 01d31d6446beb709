import gc
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from serve.contract.quick_imports import quick_imports

INTERRUPTED = """
import builtins, runpy, signal
imported = builtins.__import__
def interrupt(name, *arguments, **named):
    if name == "{imported}":
        signal.raise_signal(signal.SIGINT)
    return imported(name, *arguments, **named)
builtins.__import__ = interrupt
{start}
"""
RUN = 'runpy.run_module("{}", run_name="__main__")'


@pytest.fixture
def _process_is_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    gc.unfreeze()
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("imported", "start"),
    [
        ("train.cli", RUN.format("train")),
        ("export.cli", RUN.format("export")),
        ("serve.cli", RUN.format("serve")),
        ("serve.client.http", "from serve.__main__ import segment_files; segment_files()"),
    ],
)
def test_an_interrupt_while_the_imports_run_ends_without_a_traceback(
    imported: str, start: str
) -> None:
    program = INTERRUPTED.format(imported=imported, start=start)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, b"", b"")


@pytest.mark.usefixtures("_process_is_as_before")
def test_the_imports_change_nothing_that_comes_after_them() -> None:
    before = signal.getsignal(signal.SIGINT)
    with quick_imports():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        assert not gc.isenabled()
    assert signal.getsignal(signal.SIGINT) == before
    assert gc.isenabled()


@pytest.mark.usefixtures("_process_is_as_before")
def test_an_interrupt_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for `command &`
    with quick_imports():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
