"""Every command prints in every locale, and ends quietly where nobody reads on."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from export.cli import run as export
from serve.cli import main as serve
from serve.client.segment_files import main as segment
from serve.contract.printing import printing
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


@pytest.mark.parametrize("package", ["train", "serve", "export"])
def test_closed_streams_end_no_command(package: str) -> None:
    words = [sys.executable, "-m", package, "--help"]
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words]
    assert subprocess.run(closed, check=False).returncode == 0


def test_what_is_printed_to_a_closed_stream_gets_into_no_file(tmp_path: Path) -> None:
    code = """if True:
        import os, sys
        from serve.contract.printing import printing
        with printing(), open(sys.argv[1], "w") as file:
            os.write(2, b"of a library")
            file.write("ours")
    """
    written = tmp_path / "result"
    closed = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", code, str(written)]
    subprocess.run(closed, check=True)
    assert written.read_text() == "ours"


def test_train_starts_without_docstrings() -> None:
    command = [sys.executable, "-OO", "-m", "train", "fit", "--help"]
    assert "--resume" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("command", [["http"], ["slides", "run", "gone"]], ids=" ".join)
def test_serve_says_that_its_packages_need_asserts(command: list[str]) -> None:
    words = [sys.executable, "-O", "-m", "serve", *command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "PYTHONOPTIMIZE" in done.stderr


@pytest.mark.parametrize("columns", ["0", "20", None])
def test_tables_are_not_cut_where_no_terminal_is(
    columns: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    table = Table("12345678901234567890", *map(str, range(100_000_000, 100_000_006)))
    with printing():
        Console().print(table)
    assert "100000005" in capsys.readouterr().out
    assert os.environ.get("COLUMNS") == columns


def test_a_terminal_without_a_width_is_not_of_width_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with printing():
        assert Console().width >= 80
