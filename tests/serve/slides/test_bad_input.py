"""What users give by mistake, through the command line."""

import json
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serve.slides.status import read_status, verify
from tests.support.bad_slides import BAD_SLIDES
from tests.support.slide_runs import segment
from tests.support.slides import tissue_pixels, write_aperio
from tests.support.toy_bundle import write_toy_bundle

Run = Callable[..., int]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    (tmp_path / "slides").mkdir()
    return write_aperio(tmp_path / "slides" / "good.svs", tissue_pixels(500, 600))


@pytest.fixture
def run(slide: Path, toy_bundle: Path, out: Path) -> Run:
    """Segments the folder of the slide."""
    quiet = ("--progress", "quiet")
    return lambda *more, bundle=toy_bundle: segment(bundle, out, slide.parent, *quiet, *more)


def codes(out: Path) -> dict[str, str]:
    """The kind of each slide's failure, as it was kept for `status`."""
    notes = [json.loads(path.read_bytes()) for path in (out / ".work").glob("*.failed")]
    return {Path(note["path"]).name: note["code"] for note in notes}


@pytest.mark.slow
def test_every_bad_slide_is_one_line_and_the_good_one_is_done(
    slide: Path, capsys: pytest.CaptureFixture[str], run: Run, out: Path
) -> None:
    folder = slide.parent
    for name, (write, _) in BAD_SLIDES.items():
        write(folder / name)
    assert run() == 1
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


@contextmanager
def small_files(num_bytes: int) -> Iterator[None]:
    """A limit of a file's size stands for a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize("kibibytes", [4, 40, 200], ids=["plan", "block", "output"])
def test_a_disk_that_fills_up_keeps_what_is_done(
    kibibytes: int, run: Run, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_files(1024 * kibibytes):
        assert run("--format", "ome-zarr", "overview", "ome-tiff") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written" in line
    assert not (out / "good").exists()
    assert not [path for path in out.rglob("*") if "partial" in path.name]
    assert run() == 0
    assert verify(out / "good")


@pytest.mark.slow
def test_a_bundle_that_is_replaced_before_the_work_goes_on_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle")
    assert run(bundle=bundle) == 0
    write_toy_bundle(bundle, version="2.0.0")
    assert run(bundle=bundle) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the model" in line
    assert "--overwrite" in line


def test_a_cluster_without_its_extra_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    for name in [name for name in sys.modules if name.startswith("serve.slides.cluster")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run("--cluster", "auto") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "'.[cluster]'" in line
