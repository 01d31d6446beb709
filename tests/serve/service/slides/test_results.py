import contextlib
import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from serve.contract import unchanged
from serve.contract.errors import NotFoundError
from serve.service.slides import cells, reading, results
from serve.service.slides.results import Results, zip_folder
from serve.slides.errors import ResultError
from serve.slides.finish import read_summary
from tests.support.errors import raises, refusal_of
from tests.support.meanwhile import before_call
from tests.support.slide_runs import segment
from tests.support.slide_service import painted_slide, run_at_start, slide_client
from tests.support.toy_bundle import retrain, write_toy_bundle

Swap = Callable[[], None]
_ZARR = "case.ome.zarr"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two results of one slide: of other models, and with other outputs."""
    root = tmp_path_factory.mktemp("written")
    slide = painted_slide(root / "case.svs")
    for version, *formats in (("1", "ome-zarr", "overview"), ("2", "ome-zarr", "dsa")):
        bundle = write_toy_bundle(root / f"bundle-{version}", version=version)
        if version == "2":
            retrain(bundle)
        options = ("--progress", "quiet", "--format", *formats)
        assert segment(bundle, root / version, slide, *options) == 0
    return {version: root / version / "case" for version in "12"}


@pytest.fixture
def out(written: dict[str, Path], tmp_path: Path) -> Path:
    """A folder with the first result."""
    shutil.copytree(written["1"], tmp_path / "out" / "case", copy_function=shutil.copyfile)
    return tmp_path / "out"


@pytest.fixture
def swap(written: dict[str, Path], out: Path) -> Swap:
    """Puts the second result in the place of the first, once."""
    new = out / "new"
    shutil.copytree(written["2"], new, copy_function=shutil.copyfile)

    def move() -> None:
        if new.exists():
            (out / "case").rename(out / "old")
            new.rename(out / "case")

    return move


@pytest.mark.parametrize("place", ["read_passport", "read_summary", "_files"])
def test_a_result_is_never_described_by_parts_of_two(
    written: dict[str, Path], out: Path, swap: Swap, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    before_call(monkeypatch, results, place, swap)
    found = Results(out).find("case")
    assert found is not None
    assert found.passport.plan.model.version == "2"
    assert found.summary == read_summary(written["2"])
    names = {entry.file for entry in found.files}
    assert "case.dsa.json.gz" in names
    assert "case.overview.png" not in names


def test_a_result_that_is_not_there_for_a_moment_is_waited_for(
    out: Path, swap: Swap, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Results(out)
    assert kept.get("case").passport.plan.model.version == "1"
    (out / "case").rename(out / "away")

    def put_there() -> None:
        (out / "away").rename(out / "case")
        swap()

    monkeypatch.setattr(unchanged.time, "sleep", lambda _: put_there())
    assert kept.get("case").passport.plan.model.version == "2"


def test_a_result_that_was_removed_is_none_and_waited_for_once(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(unchanged.time, "sleep", pauses.append)
    kept = Results(out)
    kept.get("case")
    shutil.rmtree(out / "case")
    for _ in range(3):
        assert kept.find("case") is None
    assert len(pauses) == 1
    with raises(NotFoundError, "no result yet"):
        kept.download("case", "summary.json")


def test_an_output_that_was_removed_is_not_listed_any_more(out: Path) -> None:
    kept = Results(out)
    assert kept.get("case").store == out / "case" / _ZARR
    shutil.rmtree(out / "case" / _ZARR)
    with raises(NotFoundError, _ZARR):
        kept.download("case", _ZARR)
    with raises(NotFoundError, "has no OME-Zarr"):
        _ = kept.get("case").store


@pytest.mark.parametrize("file", ["summary.json", _ZARR, "case.overview.png"])
def test_a_download_is_of_the_result_that_is_there(
    written: dict[str, Path],
    out: Path,
    swap: Swap,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
) -> None:
    real = Results.get

    def get_and_swap(self: Results, name: str) -> results.Result:
        found = real(self, name)
        swap()
        return found

    monkeypatch.setattr(Results, "get", get_and_swap)
    if (written["2"] / file).exists():
        path, found, _ = Results(out).download("case", file)
        assert found == path.stat()
    else:
        with raises(NotFoundError, file):
            Results(out).download("case", file)


def test_a_zip_has_every_file_as_it_is(out: Path) -> None:
    store = out / "case" / _ZARR
    with zipfile.ZipFile(io.BytesIO(b"".join(zip_folder(store)))) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    files = (path for path in store.rglob("*") if path.is_file())
    assert found == {path.relative_to(out / "case").as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("part", [0, 1, 5])
def test_a_zip_of_a_result_that_is_replaced_meanwhile_does_not_end_as_if_whole(
    out: Path, swap: Swap, part: int
) -> None:
    blocks, taken = zip_folder(out / "case" / _ZARR), b""
    with contextlib.suppress(ResultError, FileNotFoundError):
        for number, block in enumerate(blocks):
            taken += block
            if number == part:
                swap()
        pytest.fail("the zip has ended")
    with pytest.raises(zipfile.BadZipFile):
        zipfile.ZipFile(io.BytesIO(taken))


def test_a_zip_of_what_is_not_there_is_no_empty_one(out: Path) -> None:
    (out / "case").rename(out / "away")
    with raises(ResultError, _ZARR):
        list(zip_folder(out / "case" / _ZARR))


@pytest.mark.parametrize("at", [0, 1])
def test_labels_and_confidence_of_a_tile_are_of_one_result(
    written: dict[str, Path], out: Path, swap: Swap, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    request = {"level": 0, "column": 0, "row": 0, "form": "npz"}

    def tile(store: Path) -> dict[str, bytes]:
        slides = reading.OpenSlides()
        _, content = reading.OPERATIONS["cells"](slides, {**request, "store": str(store)})
        return {name: array.tobytes() for name, array in np.load(io.BytesIO(content)).items()}

    expected = tile(written["2"] / _ZARR)
    assert expected["labels"] != tile(written["1"] / _ZARR)["labels"]
    before_call(monkeypatch, cells, "array_of", swap, at=at)
    assert tile(out / "case" / _ZARR) == expected


_NEVER_THE_SAME = """
import itertools, sys
if 'serve.service.slides.reading' in ' '.join(sys.orig_argv):
    from serve.contract import unchanged
    numbers = itertools.count(1)
    unchanged.stamp_of = lambda *_: next(numbers)
"""


def test_a_result_that_changes_again_and_again_is_to_be_asked_for_later(
    written: dict[str, Path], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slides").mkdir()
    shutil.copy(written["1"].parent.parent / "case.svs", tmp_path / "slides")
    run_at_start(_NEVER_THE_SAME, tmp_path, monkeypatch)
    bundle = written["1"].parent.parent / "bundle-1"
    with slide_client(bundle, tmp_path / "slides", slides_out=out) as client:
        slide = client.get("/slides").json()["slides"][0]["id"]
        answer = client.get(f"/slides/{slide}/result/tiles/0/0_0.png")
    assert refusal_of(answer, "again and again") == (503, "backend_unavailable")
    assert str(out) not in answer.text
