import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from PIL import Image

from serve.answers.format import AnswerFormat
from serve.client import segment_files
from serve.client.segment_files import main
from serve.contract.errors import BackendUnavailableError
from serve.inference.segmenter import Segmentation, TileSegmenter
from serve.inference.summary import Summary
from tests.support.meanwhile import before_call
from tests.support.pictures import blobs, encoded, painted
from tests.support.ports import free_port
from tests.support.toy_bundle import CLASSES, write_toy_bundle

IMAGE = blobs(70, 90)
FORMATS = ("labels", "overlay", "confidence", "json", "geojson", "dsa", "probabilities")
ALL_FILES = {
    "slide.labels.png", "slide.overlay.png", "slide.confidence.png", "slide.json", "slide.geojson",
    "slide.dsa.json", "slide.probabilities.npz", "summary.csv",
}  # fmt: skip


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "slide.png"
    path.write_bytes(encoded(IMAGE))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "out"


def _segment(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def _fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert _segment(*arguments) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_labels_overlay_and_numbers_are_written_by_default_and_the_classes_are_printed(
    image: Path, toy_bundle: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _segment(image, "--bundle", toy_bundle, "--out", out) == 0
    assert _names(out) == {"slide.labels.png", "slide.overlay.png", "slide.json", "summary.csv"}
    printed = capsys.readouterr().out
    assert all(tissue.name in printed for tissue in CLASSES)


def _summary(path: Path) -> Summary:
    """The service's answer in a file, without what the file says besides."""
    content = json.loads(path.read_text())
    del content["made_with"]
    return Summary.model_validate(content)


def test_the_service_and_a_bundle_give_the_same_files(
    image: Path, toy_bundle: Path, service_url: str, tmp_path: Path
) -> None:
    for name, url in (("here", toy_bundle), ("there", service_url)):
        arguments = ("--url", url, "--out", tmp_path / name, "--mpp", "0.7", "--format", *FORMATS)
        assert _segment(image, *arguments) == 0
        assert _names(tmp_path / name) == ALL_FILES
    for name in ALL_FILES - {"slide.json"}:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    here, there = (_summary(tmp_path / name / "slide.json") for name in ("here", "there"))
    assert here == there


@pytest.mark.parametrize("place", ["read_picture", "check_answer"])
def test_an_image_that_is_replaced_while_it_is_segmented_is_not_finished(
    image: Path,
    out: Path,
    service_url: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    other = encoded(IMAGE[::-1])
    before_call(monkeypatch, segment_files, place, lambda: image.write_bytes(other))
    arguments = (image, "--url", service_url, "--out", out, "--mpp", "0.7")
    assert _segment(*arguments) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: {image}: it was replaced")
    assert told.count("\n") == 1
    assert not out.exists()
    assert _segment(*arguments) == 0
    made_with = json.loads((out / "slide.json").read_text())["made_with"]
    assert made_with["image_sha256"] == hashlib.sha256(other).hexdigest()


@pytest.mark.parametrize("is_finished", [True, False])
def test_an_image_that_is_removed_meanwhile_fails_alone(
    image: Path,
    out: Path,
    toy_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_finished: bool,
) -> None:
    images = image.with_name("images")
    images.mkdir()
    for name in ("first.png", "second.png"):
        shutil.copy(image, images / name)
    arguments = (images, "--bundle", toy_bundle, "--out", out)
    if is_finished:
        assert _segment(*arguments) == 0
        capsys.readouterr()
    before_call(monkeypatch, segment_files, "_open", (images / "first.png").unlink)
    assert "first.png cannot be read" in _fails(capsys, *arguments)
    assert (out / "second.json").is_file()


def test_the_mpp_of_a_file_is_taken_and_said_to_be_the_files_also_over_http(
    tmp_path: Path, service_url: str, toy_bundle: Path
) -> None:
    (tmp_path / "slide.png").write_bytes(encoded(IMAGE, dpi=(25_400, 25_400)))
    for url in (service_url, toy_bundle):
        assert _segment(tmp_path / "slide.png", "--url", url, "--out", tmp_path, "--again") == 0
        found = json.loads((tmp_path / "slide.json").read_text())["image"]
        assert (round(found["mpp"], 3), found["mpp_source"]) == (1.0, "PNG density")


def test_the_end_says_for_how_many_images_the_mpp_was_assumed(
    tmp_path: Path, toy_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known, unknown = tmp_path / "known.png", tmp_path / "unknown.png"
    known.write_bytes(encoded(IMAGE, dpi=(25_400, 25_400)))
    unknown.write_bytes(encoded(IMAGE, dpi=(300, 300)))
    command = ("--url", str(toy_bundle), "--out", str(tmp_path / "out"))
    assert main([str(known), str(unknown), *command]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "assumed for 1 of 2 images" in last
    assert "such as unknown.png. State it" in last
    assert "300 dpi" in last
    silent = tmp_path / "silent.png"
    silent.write_bytes(encoded(IMAGE))
    assert main([str(silent), str(unknown), *command, "--again"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "assumed for 2 of 2 images, such as unknown.png. State it" in last  # who says 300 dpi
    assert main([str(known), str(unknown), *command, "--mpp", "0.5"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "assumed for 0 of 2 images; 1 files, such as known.png, state another" in last
    assert main([str(known), str(unknown), *command, "--mpp", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("assumed for 0 of 2 images")


def test_finished_images_are_skipped(
    image: Path, toy_bundle: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _segment(image, "--bundle", toy_bundle, "--out", out)
    before = (out / "slide.labels.png").stat().st_mtime_ns
    assert _segment(image, "--bundle", toy_bundle, "--out", out) == 0
    assert (out / "slide.labels.png").stat().st_mtime_ns == before
    assert "wrote 0 of 1 images" in capsys.readouterr().out
    assert (out / "summary.csv").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "missing output", "another format", "another image", "another model", "retrained",
        "damaged", "older",
        "--again", "--mpp 0.7", "--alpha 0.1", "--classes Tumor", "--simplify-px 2",
        "--min-area-px 9",
    ],
)  # fmt: skip
def test_what_is_not_finished_is_made_again(
    case: str, image: Path, toy_bundle: Path, out: Path, tmp_path: Path
) -> None:
    arguments: list[object] = ["--out", out, *(case.split() if case.startswith("--") else ())]
    _segment(image, "--bundle", toy_bundle, "--out", out)
    bundle = toy_bundle
    match case:
        case "missing output":
            (out / "slide.overlay.png").unlink()
        case "another format":
            arguments += ["--format", "geojson"]
        case "another image":  # which is older than the outputs
            image.write_bytes(encoded(blobs(70, 90, seed=1)))
            os.utime(image, (1, 1))
        case "another model":
            bundle = write_toy_bundle(tmp_path / "bundle", version="2.0.0")
        case "retrained":  # and exported under the same version
            bundle = tmp_path / "bundle"
            shutil.copytree(toy_bundle, bundle)
            manifest = (bundle / "manifest.json").read_text()
            (bundle / "manifest.json").write_text(manifest.replace("0" * 64, "1" * 64))
        case "damaged":
            (out / "slide.json").write_text("{")
        case "older":  # written before the JSON said what with
            (out / "slide.json").write_text(_summary(out / "slide.json").model_dump_json())
    os.utime(out / "slide.json", (2, 2))
    assert _segment(image, "--bundle", bundle, *arguments) == 0
    assert (out / "slide.json").stat().st_mtime > 2


@pytest.mark.slow
def test_files_of_one_run_are_not_taken_for_those_of_another(
    image: Path, toy_bundle: Path, out: Path
) -> None:
    arguments = (image, "--bundle", toy_bundle, "--out", out)
    _segment(*arguments, "--format", "overlay")
    before = (out / "slide.overlay.png").read_bytes()
    _segment(*arguments, "--format", "labels", "--alpha", "0.1")
    _segment(*arguments, "--format", "labels", "overlay", "--alpha", "0.1")
    assert (out / "slide.overlay.png").read_bytes() != before


def test_a_folder_is_the_images_in_it(
    toy_bundle: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    for name in ("b.png", "a.PNG", ".hidden.png", "deeper/c.png"):
        (folder / name).write_bytes(encoded(IMAGE))
    (folder / "notes.txt").write_text("no image")
    assert _segment(folder, "--bundle", toy_bundle, "--out", out, "--format", "json") == 0
    assert _names(out) == {"a.json", "b.json", "summary.csv"}
    nowhere = folder / "deeper" / ".." / "none"
    assert str(nowhere) in _fails(capsys, folder, nowhere, "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in _fails(capsys, tmp_path / "empty", "--out", out)


def test_an_image_that_fails_is_named_and_does_not_stop_the_others(
    image: Path,
    toy_bundle: Path,
    out: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    segment = TileSegmenter.segment

    def busy_at_first(segmenter: TileSegmenter, pixels: np.ndarray, **options: Any) -> Segmentation:
        if pixels.shape[0] == 50:
            raise BackendUnavailableError("32 requests are waiting already.")
        return segment(segmenter, pixels, **options)

    monkeypatch.setattr(TileSegmenter, "segment", busy_at_first)
    (refused := tmp_path / "refused.png").write_bytes(encoded(blobs(50, 60)))
    (damaged := tmp_path / "damaged.png").write_bytes(encoded(IMAGE)[:500])
    arguments = (refused, damaged, image, "--bundle", toy_bundle, "--out", out)
    assert _segment(*arguments) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"error: {refused}: 32 requests are waiting already."
    assert second.startswith(f"error: {damaged}: The image is damaged")
    assert _names(out) == {"slide.labels.png", "slide.overlay.png", "slide.json", "summary.csv"}


def test_the_summary_has_a_row_for_each_image_and_class(
    image: Path, toy_bundle: Path, out: Path, tmp_path: Path
) -> None:
    second = tmp_path / "second.png"
    second.write_bytes(encoded(blobs(50, 60)))
    _segment(image, second, "--bundle", toy_bundle, "--out", out, "--mpp", "0.5")
    with (out / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["slide.png"] * 5 + ["second.png"] * 5
    assert [row["name"] for row in rows[:2]] == ["Tumor", "Stroma"]
    assert sum(int(row["pixel_count"]) for row in rows[:5]) == 70 * 90
    assert sum(float(row["area_um2"]) for row in rows[5:]) == pytest.approx(50 * 60 / 4)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("s [x=100,y=200,w=180,h=140].png", ("--min-area-px", "4"), (100, 200, 188, 340)),
        ("s.png", ("--origin", 5, 6, "--downsample", 3), (5, 6, 137, 216)),
    ],
)
def test_options_of_outlines_and_of_their_place_in_the_slide_reach_the_file(
    name: str, arguments: tuple[Any, ...], expected: tuple[float, ...],
    toy_bundle: Path, out: Path, tmp_path: Path,
) -> None:  # fmt: skip
    path = tmp_path / name
    labels = np.full((70, 90), 1)
    labels[:, 44:] = 2
    path.write_bytes(encoded(painted(labels)))
    arguments = ("--format", "geojson", "--classes", "Tumor", *arguments)
    assert _segment(path, "--bundle", toy_bundle, "--out", out, *arguments) == 0
    (feature,) = json.loads((out / f"{path.stem}.geojson").read_bytes())["features"]
    assert shapely.geometry.shape(feature["geometry"]).bounds == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [(os.fsdecode(b"x\xff.png"), "udcff.png"), ("ü" * 123 + ".png", "too long a name")],
    ids=["not UTF-8", "too long for its outputs"],
)
def test_an_impossible_name_is_refused_before_any_image_is_segmented(
    name: str,
    expected: str,
    image: Path,
    toy_bundle: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image.with_name(name).write_bytes(image.read_bytes())
    assert expected in _fails(capsys, image.parent, "--bundle", toy_bundle, "--out", out)
    assert not out.exists()


def test_two_images_of_one_name_are_refused(
    image: Path, toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other" / "slide.jpg"
    other.parent.mkdir()
    other.write_bytes(encoded(IMAGE, "JPEG"))
    message = _fails(capsys, image, other, "--bundle", toy_bundle)
    assert str(image) in message
    assert str(other) in message


def test_an_image_whose_record_is_called_as_the_outlines_of_another_is_refused(
    image: Path, toy_bundle: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = image.with_name("slide.dsa.png")
    other.write_bytes(encoded(IMAGE))
    formats = ("--format", "dsa", "labels")
    message = _fails(capsys, image, other, "--bundle", toy_bundle, "--out", out, *formats)
    assert "slide.dsa.json" in message
    assert not out.exists()
    assert _segment(image, other, "--bundle", toy_bundle, "--out", out, "--format", "labels") == 0


def test_an_output_folder_that_is_a_file_is_one_message(
    image: Path, toy_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = _fails(capsys, image, "--bundle", toy_bundle, "--out", image)
    assert "slide.png cannot be used: File exists" in message
    assert "Errno" not in message


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--mpp 1000", "mpp is 1000 um per pixel"),
        ("--mpp nan", "mpp is nan um per pixel"),
        ("--jobs 0", "--jobs is 0"),
        ("--classes Muscle", "no class 'Muscle', only Tumor"),
        ("--alpha 1.5", "--alpha is 1.5; expected"),
        ("--simplify-px nan", "--simplify-px is nan; expected"),
        ("--min-area-px -1", "--min-area-px is -1; expected"),
        ("--url nowhere", "'nowhere'"),
        ("--url http://{address}", "{address}"),
        ("--url grpc://{address}", "{address}"),
    ],
)
def test_an_option_that_cannot_be_used_is_one_message(
    option: str,
    expected: str,
    image: Path,
    toy_bundle: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    address = f"127.0.0.1:{free_port()}"
    arguments = option.format(address=address).split()
    message = _fails(capsys, image, "--bundle", toy_bundle, "--out", out, *arguments)
    assert expected.format(address=address) in message
    assert not out.exists()


def test_a_half_written_output_is_never_seen(
    image: Path, toy_bundle: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file = Path.open

    def fail_at_the_second(path: Path, *mode: str, **options: Any) -> Any:
        if path.name == "slide.overlay.png":
            raise OSError("no space left on the device")
        return open_file(path, *mode, **options)

    monkeypatch.setattr(Path, "open", fail_at_the_second)
    assert _segment(image, "--bundle", toy_bundle, "--out", out) == 1
    assert _names(out) == set()


def test_images_are_worked_on_at_the_same_time_and_get_their_own_outputs(
    toy_bundle: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(5, timeout=60)
    blocks = AnswerFormat.blocks

    def wait_for_the_others(entry: AnswerFormat, *arguments: Any) -> Iterator[bytes]:
        if entry.name == "json":
            together.wait()
        return blocks(entry, *arguments)

    monkeypatch.setattr(AnswerFormat, "blocks", wait_for_the_others)
    images = [tmp_path / f"{label}.png" for label in (1, 2, 3, 4, 5)]
    for path in images:
        path.write_bytes(encoded(painted(np.full((100, 100), int(path.stem)))))
    assert _segment(*images, "--bundle", toy_bundle, "--out", out, "--jobs", 5) == 0
    for path in images:
        with Image.open(out / f"{path.stem}.labels.png") as labels:
            assert (np.asarray(labels) == int(path.stem)).all()


@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        ("slide.labels.png", ["slide.png", "slide.labels.png"]),  # a mask of their own, an image
        ("slide.labels.png", ["slide.png", "slide.labels.png", "--again"]),
        ("slide.labels.png", ["slide.png"]),
        ("slide.json", ["slide.png"]),  # annotations, for example
        ("slide.geojson", ["slide.png", "--format", "geojson"]),
        ("summary.csv", ["slide.png"]),
        ("slide.labels.png", ["."]),
    ],
)
def test_a_users_own_files_are_not_overwritten(
    theirs: str, named: list[str], image: Path, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(image.parent)
    content = encoded(IMAGE) if theirs.endswith("png") else b'{"type": "FeatureCollection"}'
    Path(theirs).write_bytes(content)
    before = _names(image.parent)
    message = _fails(capsys, *named, "--bundle", toy_bundle, "--out", ".")
    assert theirs in message or named == ["."]
    assert Path(theirs).read_bytes() == content
    assert _names(image.parent) == before


def test_a_users_own_files_are_replaced_where_they_say_so(
    image: Path, toy_bundle: Path, out: Path
) -> None:
    out.mkdir(parents=True)
    (out / "slide.json").write_text("{}")
    assert _segment(image, "--bundle", toy_bundle, "--out", out, "--again") == 0
    assert _summary(out / "slide.json").classes


def test_files_that_a_killed_run_left_without_their_record_are_made_again(
    image: Path, toy_bundle: Path, out: Path
) -> None:
    other = image.with_name("other.png")
    other.write_bytes(encoded(IMAGE))
    arguments = (image, other, "--bundle", toy_bundle, "--out", out)
    assert _segment(*arguments) == 0
    labels = (out / "other.labels.png").read_bytes()
    (out / "other.json").unlink()
    (out / "other.labels.png").write_bytes(labels[:-1])
    assert _segment(*arguments) == 0
    assert (out / "other.labels.png").read_bytes() == labels
    (out / "other.json").write_text("{}")
    assert _segment(*arguments) == 1


WINDOWS = """
import os, signal, sys
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
del os.sysconf, signal.SIGURG, signal.pthread_kill
from serve.client.segment_files import main
sys.exit(main(sys.argv[1:]))
"""
"""Takes away what Python lacks on Windows, where researchers have their images."""


@pytest.mark.slow
def test_a_client_needs_nothing_that_windows_lacks(
    service_url: str, image: Path, out: Path
) -> None:
    command = [str(image), "--url", service_url, "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore::UserWarning:filelock", "-c", WINDOWS, *command],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {"slide.labels.png", "slide.json"} <= _names(out)
