import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from serve.contract.errors import BackendUnavailableError, BackendUnreachableError, BundleError
from serve.contract.manifest import MANIFEST_FILE, Manifest, read_bundle, sha256_of
from serve.inference.onnxruntime import OnnxRuntimeBackend
from serve.inference.segmenter import open_backend
from serve.inference.triton import TritonBackend
from serve.settings import ServeSettings
from tests.support.errors import raises
from tests.support.ports import free_port
from tests.support.toy_bundle import TILE_SIZE_PX, write_toy_bundle

OUTPUTS = ("labels", "confidence", "low_res_probabilities", "iou_scores")


@pytest.fixture(scope="module")
def manifest(toy_bundle: Path) -> Manifest:
    return read_bundle(toy_bundle)


@pytest.fixture(scope="module")
def backend(toy_bundle: Path, manifest: Manifest) -> Iterator[OnnxRuntimeBackend]:
    backend = OnnxRuntimeBackend(toy_bundle, manifest)
    yield backend
    backend.close()


def _tiles(count: int) -> np.ndarray:
    shape = (count, TILE_SIZE_PX, TILE_SIZE_PX, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_the_outputs_have_the_dtypes_and_shapes_of_the_manifest(
    backend: OnnxRuntimeBackend, manifest: Manifest
) -> None:
    answers = backend.infer(_tiles(2), OUTPUTS)
    found = {name: (str(a.dtype), a.shape[1:]) for name, a in answers.items()}
    assert found == {spec.name: (spec.dtype, spec.shape[1:]) for spec in manifest.outputs}


def test_only_the_outputs_that_are_asked_for_come_back(backend: OnnxRuntimeBackend) -> None:
    assert set(backend.infer(_tiles(1), ("iou_scores",))) == {"iou_scores"}


def test_the_answers_are_those_of_a_plain_session(
    backend: OnnxRuntimeBackend, toy_bundle: Path
) -> None:
    session = onnxruntime.InferenceSession(
        toy_bundle / "model.onnx", providers=["CPUExecutionProvider"]
    )
    plain = session.run(list(OUTPUTS), {"image": _tiles(3)})
    answers = backend.infer(_tiles(3), OUTPUTS)
    assert all(np.array_equal(answers[n], p) for n, p in zip(OUTPUTS, plain, strict=True))


def test_a_batch_over_the_largest_is_split_and_joined_in_order(
    backend: OnnxRuntimeBackend, tmp_path: Path
) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle", max_batch_size=2)
    split = OnnxRuntimeBackend(bundle, read_bundle(bundle))
    sizes: list[int] = []
    infer_batch = split._infer_batch
    split._infer_batch = lambda images, outputs: (  # type: ignore[method-assign]
        sizes.append(len(images)) or infer_batch(images, outputs)
    )
    answers = split.infer(_tiles(5), OUTPUTS)
    assert sizes == [2, 2, 1]
    whole = backend.infer(_tiles(5), OUTPUTS)
    assert all(np.array_equal(answers[name], whole[name]) for name in OUTPUTS)


def test_a_precision_that_the_bundle_lacks_is_refused(toy_bundle: Path, manifest: Manifest) -> None:
    with raises(BundleError, "fp16", "fp32"):
        OnnxRuntimeBackend(toy_bundle, manifest, precision="fp16")


def test_cuda_that_is_not_there_is_refused_and_not_replaced(
    toy_bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with raises(BackendUnavailableError, "CUDA", "CPUExecutionProvider"):
        OnnxRuntimeBackend(toy_bundle, manifest, provider="cuda")


def test_a_file_that_is_no_onnx_is_refused(toy_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(toy_bundle, tmp_path / "bundle")
    (bundle / "model.onnx").write_bytes(b"no model")
    content = json.loads((bundle / MANIFEST_FILE).read_text())
    content["artefacts"][0]["sha256"] = sha256_of(bundle / "model.onnx")
    (bundle / MANIFEST_FILE).write_text(json.dumps(content))
    with raises(BundleError, "model.onnx", "ONNX Runtime"):
        OnnxRuntimeBackend(bundle, read_bundle(bundle))


def test_the_settings_choose_the_backend(toy_bundle: Path, manifest: Manifest) -> None:
    settings = ServeSettings(bundle=toy_bundle, threads=1)
    assert isinstance(open_backend(settings, manifest)[0], OnnxRuntimeBackend)


def test_a_triton_that_is_not_there_is_named_with_what_to_do(manifest: Manifest) -> None:
    url = f"127.0.0.1:{free_port()}"
    settings = ServeSettings(backend="triton", triton_url=url)
    with raises(BackendUnreachableError, "Triton", url, "segmenter", "FOCALPATH_TRITON_URL"):
        open_backend(settings, manifest)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "127.0.0.1", "localhost:grpc", ""])
def test_an_address_that_is_no_host_and_port_is_refused(url: str, manifest: Manifest) -> None:
    with raises(BackendUnavailableError, url, "host:port"):
        TritonBackend(url, manifest)
