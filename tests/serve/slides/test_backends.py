"""The same slide through every backend."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from export.triton import publish
from serve.contract.manifest import read_bundle
from serve.inference.triton import TritonBackend
from serve.slides.finish import read_passport
from serve.slides.store import CONFIDENCE, LABELS, array_of
from tests.support.openvino import needs_openvino, passed_in_openvino
from tests.support.slide_runs import segment
from tests.support.slides import tissue_pixels, write_aperio
from tests.support.toy_bundle import write_toy_bundle
from tests.support.triton_server import TritonServer

pytestmark = pytest.mark.slow

_SAME_LABELS = 0.999
"""Share of cells: a backend may round a probability to the next of 255 steps."""
_SAME_CONFIDENCE = 2
"""Steps of 255."""


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = tissue_pixels(500, 700)
    pixels[100:200, 100:300] = (200, 30, 30)
    pixels[300:400, 200:500] = (30, 30, 200)
    return write_aperio(tmp_path_factory.mktemp("slides") / "slide.svs", pixels)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_toy_bundle(tmp_path_factory.mktemp("bundles") / "bundle")
    passed_in_openvino(read_bundle(folder)).write(folder)
    return folder


def maps(slide: Path, bundle: Path, out: Path, *options: str) -> list[NDArray[np.uint8]]:
    """Labels and confidence of the slide."""
    quiet = ("--progress", "quiet", "--format", "ome-zarr")
    assert segment(bundle, out, slide, *quiet, *options) == 0
    group = zarr.open_group(out / "slide" / "slide.ome.zarr", mode="r")
    return [np.asarray(array_of(group, name)[:]) for name in (LABELS, CONFIDENCE)]


@pytest.fixture(scope="module")
def expected(
    slide: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[NDArray[np.uint8]]:
    found = maps(slide, bundle, tmp_path_factory.mktemp("out"), "--provider", "cpu")
    assert len(np.unique(found[0])) >= 3
    return found


def check(found: list[NDArray[np.uint8]], expected: list[NDArray[np.uint8]]) -> None:
    assert (found[0] == expected[0]).mean() >= _SAME_LABELS
    assert np.abs(found[1].astype(int) - expected[1]).max() <= _SAME_CONFIDENCE


def test_openvino_gives_the_labels_of_onnx_runtime(
    slide: Path, bundle: Path, expected: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    needs_openvino()
    check(maps(slide, bundle, tmp_path, "--provider", "openvino"), expected)
    assert read_passport(tmp_path / "slide").plan.model.runs_on == "openvino"


@pytest.mark.triton
def test_triton_gives_the_labels_of_onnx_runtime(
    slide: Path,
    bundle: Path,
    expected: list[NDArray[np.uint8]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    publish(bundle, tmp_path / "repository")
    with TritonServer(tmp_path / "repository") as server:
        options = ("--backend", "triton", "--triton-url", server.grpc_url)
        check(maps(slide, bundle, tmp_path / "out", *options), expected)
        assert read_passport(tmp_path / "out" / "slide").plan.model.runs_on == "triton"
    shutil.rmtree(tmp_path / "out")
    assert segment(bundle, tmp_path / "out", slide, *options) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert server.grpc_url in line


@pytest.mark.triton
def test_a_triton_that_restarts_in_the_middle_of_a_slide_costs_no_tile(
    slide: Path,
    bundle: Path,
    expected: list[NDArray[np.uint8]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish(bundle, tmp_path / "repository")
    with TritonServer(tmp_path / "repository") as server:
        left, infer = iter(range(20)), TritonBackend.infer

        def infer_or_restart(self: TritonBackend, *arguments: Any) -> Any:
            if next(left, None) == 10:
                server.kill()
                server.start()
            return infer(self, *arguments)

        monkeypatch.setattr(TritonBackend, "infer", infer_or_restart)
        monkeypatch.setattr("serve.inference.patience.MAX_FAILURES", 7)  # this machine may be busy
        options = ("--backend", "triton", "--triton-url", server.grpc_url)
        check(maps(slide, bundle, tmp_path / "out", *options), expected)
        assert next(left, None) is None
