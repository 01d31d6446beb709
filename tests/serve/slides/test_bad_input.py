"""What users give by mistake, through the command line."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from serve.cli import main
from serve.slides.status import read_status, verify
from tests.support import ROOT
from tests.support.bad_slides import BAD_SLIDES
from tests.support.slides import tissue_pixels, write_aperio
from tests.support.toy_bundle import write_toy_bundle

pytestmark = pytest.mark.slow


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_aperio(tmp_path / "slides" / "good.svs", tissue_pixels(500, 600))


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()


def run(folder: Path, bundle: Path, *more: str) -> int:
    settings = ("--bundle", str(bundle), "--threads", "1", "--block-cells", "64")
    out = ("--out", str(folder.parent / "out"), "--progress", "quiet")
    return main(["slides", "run", str(folder), *settings, *out, *more])


def codes(out: Path) -> dict[str, str]:
    """The kind of each slide's failure, as it was kept for `status`."""
    notes = [json.loads(path.read_bytes()) for path in (out / ".work").glob("*.failed")]
    return {Path(note["path"]).name: note["code"] for note in notes}


def test_every_bad_slide_is_one_line_and_the_good_one_is_done(
    slide: Path, toy_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = slide.parent, slide.parents[1] / "out"
    for name, (write, _) in BAD_SLIDES.items():
        write(folder / name)
    assert run(folder, toy_bundle) == 1
    lines = capsys.readouterr().err.splitlines()
    assert codes(out) == {name: code for name, (_, code) in BAD_SLIDES.items()}
    assert len(lines) == len(BAD_SLIDES)
    for name in BAD_SLIDES:
        (line,) = (line for line in lines if line.startswith(f"error: {folder / name}: "))
        assert f"{name}: {folder}/{name}: " not in line
        assert not (out / Path(name).stem).exists()
    assert any("password" in line for line in lines)
    assert verify(out / "good")
    states = {status.name: status.state for status in read_status(out)}
    assert states.pop("good") == "done"
    assert set(states.values()) == {"failed"}


@pytest.mark.parametrize("kibibytes", [4, 40, 200])
def test_a_disk_that_fills_up_keeps_what_is_done(
    kibibytes: int, slide: Path, toy_bundle: Path
) -> None:
    """A limit of a file's size stands for the disk: in the plan, a block or an output."""
    out = slide.parents[1] / "out"
    command = [sys.executable, "-m", "serve", "slides", "run", str(slide), "--out", str(out)]
    command += ["--bundle", str(toy_bundle), "--threads", "1", "--block-cells", "64"]
    limit = 1024 * kibibytes

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [*command, "--format", "ome-zarr", "overview", "ome-tiff", "--progress", "quiet"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if "COVERAGE" not in name},
        preexec_fn=fill,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "cannot be written" in done.stderr
    assert not (out / "good").exists()
    assert not [path for path in out.rglob("*") if "partial" in path.name]
    assert run(slide, toy_bundle, "--out", str(out)) == 0
    assert verify(out / "good")


def test_a_bundle_that_is_replaced_before_the_work_goes_on_is_told(
    slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle")
    assert run(slide.parent, bundle) == 0
    write_toy_bundle(bundle, version="2.0.0")
    assert run(slide.parent, bundle) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the model" in line
    assert "--overwrite" in line


def test_a_cluster_without_its_extra_is_told(
    slide: Path,
    toy_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in sys.modules if name.startswith("serve.slides.cluster")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(slide.parent, toy_bundle, "--cluster", "auto") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "'.[cluster]'" in line
