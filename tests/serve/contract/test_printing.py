"""Every command prints in every locale, and ends quietly where nobody reads on."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

import pytest

from export.cli import run as export
from serve.cli import main as serve
from serve.client.segment_files import main as segment
from train.cli import main as train


@pytest.mark.parametrize(
    "command",
    [
        lambda: serve(["segment", "gone.png"]),
        lambda: segment(["gone.png"]),
        lambda: export(["gone"]),
        train,
    ],
    ids=["serve", "focalpath-segment", "export", "train"],
)
def test_a_letter_that_a_terminal_lacks_ends_no_command(
    command: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    monkeypatch.setattr(sys, "argv", ["train", "check", "gone"])
    with suppress(SystemExit):
        command()
    print("Drüse ■", flush=True)
    assert written.getvalue().endswith(b"Dr?se ?\n")


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "train", "check", "--help"],
        ["-m", "serve", "--help"],
        ["-m", "serve", "doctor"],
        ["-c", "from serve.client.segment_files import main; main(['--help'])"],
        ["-m", "export", "--help"],
    ],
    ids=["train", "serve", "doctor", "focalpath-segment", "export"],
)
def test_a_reader_that_leaves_early_is_no_error(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, *words]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_mistake_is_told_also_where_nobody_reads_the_rest() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "train", "check", "gone"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode == 1
    assert "gone" in done.stderr
