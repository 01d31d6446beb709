"""ONNX Runtime on a real GPU; skipped where there is none."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from serve.contract.errors import BackendUnavailableError
from serve.contract.manifest import Manifest, read_bundle
from serve.inference.onnxruntime import OnnxRuntimeBackend
from serve.inference.providers import TF32_AGREEMENT, open_in_process
from serve.inference.segmenter import open_segmenter
from serve.settings import InferenceSettings
from tests.support.cuda import MEBIBYTE, free_memory, nearly_full_gpu, needs_cuda
from tests.support.errors import raises
from tests.support.pictures import painted
from tests.support.toy_bundle import CLASSES, write_toy_bundle

pytestmark = pytest.mark.gpu

OUTPUTS = ("labels", "confidence", "low_res_probabilities", "iou_scores")
SIDE = 1024


@pytest.fixture(scope="session", autouse=True)
def _needs_cuda() -> None:
    """Comes before what takes a while to make, which is of the session, too."""
    needs_cuda()


@pytest.fixture(scope="module")
def large_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model on tiles of 1024 pixels: a batch of 64 takes more than 2 GiB."""
    folder = tmp_path_factory.mktemp("large")
    return write_toy_bundle(folder, tile_size_px=SIDE, max_batch_size=64)


@pytest.fixture(scope="module")
def manifest(large_bundle: Path) -> Manifest:
    return read_bundle(large_bundle)


@pytest.fixture
def backend(large_bundle: Path, manifest: Manifest) -> Iterator[OnnxRuntimeBackend]:
    backend = OnnxRuntimeBackend(large_bundle, manifest, provider="cuda")
    yield backend
    backend.close()


def _tiles(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def test_the_gpu_answers_as_the_cpu_does(
    backend: OnnxRuntimeBackend, large_bundle: Path, manifest: Manifest
) -> None:
    on_cpu = OnnxRuntimeBackend(large_bundle, manifest)
    for count in (1, 3):
        found, expected = (one.infer(_tiles(count), OUTPUTS) for one in (backend, on_cpu))
        assert np.mean(found["labels"] == expected["labels"]) > TF32_AGREEMENT
        for name in ("confidence", "low_res_probabilities"):
            assert np.abs(found[name].astype(int) - expected[name].astype(int)).max() <= 4
        assert np.allclose(found["iou_scores"], expected["iou_scores"], atol=1e-2)


def test_only_the_outputs_that_are_asked_for_come_back(backend: OnnxRuntimeBackend) -> None:
    assert set(backend.infer(_tiles(1), ("iou_scores",))) == {"iou_scores"}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_exported_model_on_the_gpu_has_the_labels_of_the_export(
    exported_bundle: Path, precision: str
) -> None:
    settings = InferenceSettings(bundle=exported_bundle, provider="cuda", precision=precision)  # type: ignore[arg-type]
    manifest = read_bundle(exported_bundle)
    backend, runs_on = open_in_process(settings, manifest)
    assert (runs_on.provider, runs_on.precision) == ("cuda", precision)
    on_cpu = OnnxRuntimeBackend(exported_bundle, manifest)
    side = manifest.tile_size_px
    tiles = np.random.default_rng(0).integers(0, 256, (5, side, side, 3), np.uint8)
    found, expected = (one.infer(tiles, ("labels",))["labels"] for one in (backend, on_cpu))
    assert np.mean(found == expected) > TF32_AGREEMENT
    backend.close()


def test_auto_takes_the_gpu_and_says_why(exported_bundle: Path) -> None:
    with open_segmenter(InferenceSettings(bundle=exported_bundle)) as segmenter:
        runs_on = segmenter.runs_on
        assert runs_on is not None
        assert runs_on.provider == "cuda"
        assert not any(trial.problem for trial in runs_on.trials)


def test_many_images_at_once_get_their_own_answers(large_bundle: Path) -> None:
    settings = InferenceSettings(bundle=large_bundle, provider="cuda", parallel_batches=2)
    images = {
        label: painted(np.full((SIDE, SIDE), label, np.uint8))
        for label in range(1, 1 + len(CLASSES))
    }
    with open_segmenter(settings) as segmenter, ThreadPoolExecutor(8) as pool:
        wanted = [*images] * 8
        found = pool.map(lambda label: segmenter.segment(images[label]).labels, wanted)
        for label, labels in zip(wanted, found, strict=True):
            assert (labels == label).all()


def test_a_batch_that_the_gpus_memory_cannot_hold_is_one_error_and_the_next_ones_go_on(
    backend: OnnxRuntimeBackend,
) -> None:
    expected = backend.infer(_tiles(1), ("labels",))["labels"]
    with nearly_full_gpu(left_mib=512):
        with raises(
            BackendUnavailableError, "64 tiles", "memory is full", "FOCALPATH_MAX_BATCH_SIZE"
        ):
            backend.infer(_tiles(64), ("labels",))
        assert np.array_equal(backend.infer(_tiles(1), ("labels",))["labels"], expected)
    whole = backend.infer(_tiles(64), ("labels",))["labels"]
    assert np.array_equal(whole[:1], expected)


def test_a_model_for_which_the_gpu_has_no_memory_is_one_error(
    large_bundle: Path, manifest: Manifest, backend: OnnxRuntimeBackend
) -> None:
    backend.infer(_tiles(1), ("labels",))  # a context exists
    with nearly_full_gpu(left_mib=1), raises(BackendUnavailableError, "CUDA"):
        second = OnnxRuntimeBackend(large_bundle, manifest, provider="cuda")
        second.infer(_tiles(1), ("labels",))


def test_a_closed_backend_gives_its_memory_back(
    large_bundle: Path, manifest: Manifest, backend: OnnxRuntimeBackend
) -> None:
    backend.infer(_tiles(1), ("labels",))  # what CUDA keeps for the process is there
    before = free_memory()
    second = OnnxRuntimeBackend(large_bundle, manifest, provider="cuda")
    second.infer(_tiles(64), ("labels",))
    taken = before - free_memory()
    second.close()
    assert taken > 2048 * MEBIBYTE
    assert before - free_memory() < taken / 10
