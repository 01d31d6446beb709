import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serve.__main__ import main
from serve.settings import ServeSettings
from tests.http_service import free_port
from tests.pictures import blobs, encoded

IMAGE = blobs(70, 90)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "slide.png"
    path.write_bytes(encoded(IMAGE))
    return path


def _fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message


def test_segment_writes_labels_overlay_and_numbers(
    image: Path, toy_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out"
    assert main(["segment", str(image), "--bundle", str(toy_bundle), "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {
        "slide.labels.png",
        "slide.overlay.png",
        "slide.json",
    }
    with Image.open(out / "slide.labels.png") as labels:
        assert (labels.mode, labels.size) == ("P", (90, 70))
    with Image.open(out / "slide.overlay.png") as overlay:
        assert (overlay.mode, overlay.size) == ("RGB", (90, 70))
    assert json.loads((out / "slide.json").read_text())["image"] == {
        "width_px": 90,
        "height_px": 70,
    }


def test_segment_over_http_writes_the_same_files(
    image: Path, toy_bundle: Path, service_url: str, tmp_path: Path
) -> None:
    assert main(["segment", str(image), "--bundle", str(toy_bundle), "--out", f"{tmp_path}/a"]) == 0
    assert main(["segment", str(image), "--url", service_url, "--out", f"{tmp_path}/b"]) == 0
    for name in ("slide.labels.png", "slide.overlay.png", "slide.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_segment_prints_a_row_per_class(
    image: Path, toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["segment", str(image), "--bundle", str(toy_bundle), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("Tumor", "Stroma", "Inflammatory", "Necrosis", "Other"))


def test_a_missing_image_fails_before_anything_is_written(
    image: Path, toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    missing = tmp_path / "gone.png"
    message = _fails(capsys, "segment", image, missing, "--bundle", toy_bundle, "--out", out)
    assert "gone.png is no file" in message
    assert not out.exists()


def test_a_damaged_image_leaves_no_file_behind(
    toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged, out = tmp_path / "damaged.png", tmp_path / "out"
    damaged.write_bytes(encoded(IMAGE)[:500])
    assert "damaged.png" in _fails(capsys, "segment", damaged, "--bundle", toy_bundle, "--out", out)
    assert not out.exists()


def test_two_images_of_one_name_are_refused(
    image: Path, toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other" / "slide.jpg"
    other.parent.mkdir()
    other.write_bytes(encoded(IMAGE, "JPEG"))
    message = _fails(capsys, "segment", image, other, "--bundle", toy_bundle)
    assert "more than one image is called slide" in message


def test_an_output_folder_that_is_a_file_is_one_message(
    image: Path, toy_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = _fails(capsys, "segment", image, "--bundle", toy_bundle, "--out", image)
    assert "slide.png" in message


@pytest.mark.parametrize("command", ["http", "benchmark"])
def test_a_missing_bundle_is_one_message(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no bundle at" in _fails(capsys, command, "--bundle", tmp_path / "nowhere")


def test_a_damaged_bundle_is_refused_before_the_service_starts(
    toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(toy_bundle, tmp_path / "bundle")
    with (bundle / "model.onnx").open("ab") as model:
        model.write(b"x")
    assert "is damaged: its SHA-256" in _fails(capsys, "http", "--bundle", bundle)


def test_a_port_in_use_is_one_message(toy_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = _fails(capsys, "http", "--bundle", toy_bundle, "--port", port)
    assert f"port {port}: Address already in use" in message
    assert "--port" in message


@pytest.mark.parametrize(("flag", "value"), [("--host", "localhost"), ("--port", "70000")])
def test_an_address_that_cannot_be_listened_at_is_one_message(
    flag: str, value: str, toy_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert value in _fails(capsys, "http", "--bundle", toy_bundle, flag, value)


def test_a_service_that_is_not_there_is_one_message(
    image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert f"no service at {url}" in _fails(capsys, "segment", image, "--url", url)


def test_a_flag_out_of_range_is_refused(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["segment", str(image), "--threads", "-1"])
    assert stopped.value.code == 2
    assert "threads is -1, expected a value" in capsys.readouterr().err


def test_a_variable_that_cannot_be_read_is_one_message(
    image: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOCALPATH_THREADS", "many")
    assert "FOCALPATH_THREADS is 'many'" in _fails(capsys, "segment", image)


def test_flags_come_before_the_environment(
    image: Path, toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOCALPATH_BUNDLE", str(toy_bundle))
    assert main(["segment", str(image), "--out", str(tmp_path / "out")]) == 0
    arguments = ["segment", str(image), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--bundle", str(tmp_path / "nowhere")]) == 1


def test_benchmark_measures_in_process_and_over_http(
    toy_bundle: Path, service_url: str, tmp_path: Path
) -> None:
    out = tmp_path / "benchmark.json"
    arguments = ["--url", service_url, "--num-requests", "3", "--out", str(out)]
    sizes = ["--image-sizes", "64", "100"]
    assert main(["benchmark", "--bundle", str(toy_bundle), *arguments, *sizes]) == 0
    report = json.loads(out.read_text())
    measured = [(row["route"], row["image_size_px"]) for row in report["latencies"]]
    assert measured == [
        ("ONNX Runtime in process", 64),
        ("HTTP", 64),
        ("ONNX Runtime in process", 100),
        ("HTTP", 100),
    ]
    assert all(0 < row["median_ms"] <= row["p95_ms"] for row in report["latencies"])
    assert report["machine"]["num_cpus"] > 0


def test_the_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["http", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for name in ServeSettings.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in printed


def test_the_median_and_the_95th_percentile_are_taken_over_the_timed_requests(
    toy_bundle: Path,
) -> None:
    from serve.benchmark import measure
    from serve.segmenter import open_segmenter

    ticks = iter(np.cumsum([0, 0.010, 0, 0.030, 0, 0.020]))
    with open_segmenter(ServeSettings(bundle=toy_bundle)) as segmenter:
        latency = measure(
            segmenter, IMAGE, route="test", num_requests=3, clock=lambda: float(next(ticks))
        )
    assert latency.median_ms == pytest.approx(20)
    assert latency.p95_ms == pytest.approx(29)
    assert latency.images_per_second == pytest.approx(50)
