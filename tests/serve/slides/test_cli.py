import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from serve.cli import main
from serve.slides import commands
from serve.slides.lock import slide_lock
from serve.slides.outputs.registry import FORMATS
from serve.slides.progress import Bar, JsonLines
from tests.support import ROOT
from tests.support.dicom_slides import write_dicom_slide
from tests.support.meanwhile import before_call
from tests.support.slide_runs import segment
from tests.support.slide_service import run_at_start
from tests.support.slides import tissue_pixels, write_aperio

Run = Callable[..., int]


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_aperio(tmp_path / "slide.svs", tissue_pixels(300, 400))


@pytest.fixture
def run(slide: Path, toy_bundle: Path) -> Run:
    """Segments the slide, or others, into the folder `out` beside it."""
    out = slide.parent / "out"
    return lambda *more, path=slide, bundle=toy_bundle: segment(bundle, out, path, *more)


def test_run_status_and_verify(slide: Path, capsys: pytest.CaptureFixture[str], run: Run) -> None:
    assert run("--progress", "json") == 0
    printed = capsys.readouterr()
    events = [json.loads(line) for line in printed.err.splitlines()]
    assert [event["event"] for event in events][0 :: len(events) - 1] == ["begin", "end"]
    assert {event["slide"] for event in events} == {"slide"}
    assert "slide" in printed.out
    out = str(slide.parent / "out")
    assert main(["slides", "status", out]) == 0
    assert "done" in capsys.readouterr().out
    assert main(["slides", "verify", out]) == 0
    for name in ("summary.json", "run.json"):
        (slide.parent / "out" / "slide" / name).write_text("{}")
        assert main(["slides", "verify", out]) == 1
        assert name in capsys.readouterr().err
    assert main(["slides", "status", out]) == 0
    assert "failed" in capsys.readouterr().out


def test_a_result_that_is_moved_away_during_the_run_keeps_no_other_from_the_report(
    tmp_path: Path,
    slide: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    run: Run,
) -> None:
    shutil.copy(slide, tmp_path / "first.svs")
    moved = tmp_path / "out" / "first", tmp_path / "moved"
    before_call(monkeypatch, commands, "_report", lambda: moved[0].rename(moved[1]))
    assert run(tmp_path / "first.svs", "--progress", "quiet") == 0
    printed = capsys.readouterr()
    assert "note: first: " in printed.out
    assert printed.err == ""
    rows = (tmp_path / "out" / "summary.csv").read_text().splitlines()[1:]
    assert {row.partition(",")[0] for row in rows} == {"slide"}


def test_verify_leaves_the_table_alone_that_a_run_at_work_will_write(
    slide: Path, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    out = slide.parent / "out"
    assert run("--progress", "quiet") == 0
    assert run("--progress", "quiet", "--mpp", "0.45", "--overwrite") == 0
    (out / "summary.csv").write_text("slide,class\nslide,Tumor\n")
    (out / ".work" / "next").mkdir()
    with slide_lock(out / ".work" / "next.lock"):
        assert main(["slides", "verify", str(out)]) == 0
    assert "summary.csv is not verified" in capsys.readouterr().out
    assert main(["slides", "verify", str(out)]) == 1
    assert "summary.csv" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dicom_slide_without_its_finest_file_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    for name in ("whole", "part"):
        write_dicom_slide(tmp_path / name, tissue_pixels(256, 320), mpp=(0.25, 0.25))
    (tmp_path / "part" / "1.dcm").unlink()
    more = ("--format", "overview", "--tissue", "none")
    assert run(tmp_path / "part", *more, path=tmp_path / "whole") == 0
    status = ["slides", "status", str(tmp_path / "out")]
    for printed in (capsys.readouterr().out, (main(status), capsys.readouterr().out)[1]):
        notes = [line for line in printed.splitlines() if line.startswith("note:")]
        assert len(notes) == 1
        assert notes[0].startswith("note: part: ")
        assert "80 x 64 px" in notes[0]
    summaries = {name: tmp_path / "out" / name / "summary.json" for name in ("whole", "part")}
    found = {name: json.loads(path.read_bytes()) for name, path in summaries.items()}
    assert {name: one["mpp"] for name, one in found.items()} == {"whole": 0.25, "part": 1.0}
    assert {name: len(one["notes"]) for name, one in found.items()} == {"whole": 0, "part": 1}


SLOW = """
import sys, time
def look(event, arguments):
    if event == "open" and "/done/" in str(arguments[0]):
        time.sleep(0.5)
sys.addaudithook(look)
"""
"""Each of a hundred blocks takes a while, so that a signal meets the run at work."""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_end_leaves_what_it_has_done_and_nothing_else(
    number: int, toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_at_start(SLOW, tmp_path, monkeypatch)
    slide = write_aperio(tmp_path / "slide.svs", tissue_pixels(2000, 3000))
    command = [sys.executable, "-m", "serve", "slides", "run", str(slide), "--threads", "1"]
    command += ["--bundle", str(toy_bundle), "--out", str(tmp_path / "out"), "--block-cells", "64"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=ROOT) as process:
        work = tmp_path / "out" / ".work"
        deadline = time.monotonic() + 120
        while len(list(work.glob("slide/done/*.json"))) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert b"Traceback" not in said
    assert {path.name for path in work.iterdir()} == {"slide", ".slides.json"}  # and no lock
    assert list(work.rglob("*.partial")) == []


def test_the_help_names_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["slides", "run", "--help"])
    words = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    described = words.split("What to write beside the numbers:")[1].split("--progress")[0]
    assert [name for name in FORMATS if f" {name}" not in described] == []


def test_verify_tells_that_there_is_no_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "begun" / ".work" / "a").mkdir(parents=True)
    for folder in ("begun", "empty"):
        (tmp_path / folder).mkdir(exist_ok=True)
        assert main(["slides", "verify", str(tmp_path / folder)]) == 1
        printed = capsys.readouterr()
        assert f"{tmp_path / folder} has no finished result" in printed.err
    assert main(["slides", "verify", str(tmp_path / "begun")]) == 1
    assert "a: stopped" in capsys.readouterr().out


@pytest.mark.slow
def test_names_with_brackets_are_printed_as_they_are(
    slide: Path, toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    named = slide.rename(slide.with_name("[bold]a.svs"))
    bundle = Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))
    manifest = (bundle / "manifest.json").read_text(encoding="utf-8")
    (bundle / "manifest.json").write_text(manifest.replace('"Other"', '"Other [/b]"'))
    assert run("--progress", "quiet", path=named, bundle=bundle) == 0
    assert main(["slides", "status", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("[bold]a") == 2
    assert "Other [/b]" in printed


@pytest.mark.slow
def test_a_path_with_a_line_feed_is_one_line_of_an_error(
    slide: Path, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    odd = slide.parent / "line\nfeed.svs"
    odd.write_bytes(slide.read_bytes())
    assert run(odd, "--progress", "quiet") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "line\\nfeed.svs" in line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--format", "bmp"), "bmp"),
        (("--overlap", "0.9"), "overlap"),
        (("--block-cells", "100"), "block-cells"),
        (("--read-threads", "0"), "read-threads"),
        (("--bundle", "gone"), "gone"),
        (("--tissue", "autp"), "autp"),
        (("--tissue", ""), "''"),
        (("--reader", "opensl"), "opensl"),
    ],
)
def test_what_cannot_be_used_is_told_before_anything_starts(
    arguments: tuple[str, str], told: str, slide: Path, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    assert run(*arguments) == 1
    assert told in capsys.readouterr().err
    assert not (slide.parent / "out").exists()


def test_a_table_of_something_else_is_not_overwritten(
    slide: Path, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    table = slide.parent / "out" / "summary.csv"
    table.parent.mkdir()
    table.write_text("patient;age\n1;70\n")
    assert run() == 1
    assert str(table) in capsys.readouterr().err
    assert table.read_text() == "patient;age\n1;70\n"


@pytest.mark.parametrize("command", ["status", "verify"])
def test_a_folder_that_is_not_there_is_told(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["slides", command, str(tmp_path / "gone")]) == 1
    assert "gone" in capsys.readouterr().err


def test_the_bar_shows_slides_tiles_and_the_binding_stage() -> None:
    text = io.StringIO()
    bar = Bar(3, Console(file=text, force_terminal=True, width=160))
    bar.begin_slide("first", 10, 2)
    bar.add_tiles("first", 3)
    bar.bound_by("first", "model")
    bar.close()
    shown = text.getvalue()
    for part in ("1/3", "first", "5/10 tiles", "/s", "bound by model"):
        assert part in shown, part


def test_the_log_tells_progress_every_ten_seconds() -> None:
    text = io.StringIO()
    now = [0.0]
    log = JsonLines(3, text, clock=lambda: now[0])
    log.begin_slide("first", 10, 0)
    for _ in range(4):
        now[0] += 6
        log.add_tiles("first", 1)
    events = [json.loads(line) for line in text.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["begin", "progress", "progress"]
    assert [event["tiles_done"] for event in events] == [0, 2, 4]
    assert events[-1]["slides"] == 3
