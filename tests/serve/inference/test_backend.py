"""What all backends of this process do alike, and which one the settings open."""

import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from serve.contract.errors import BackendUnavailableError, BackendUnreachableError, BundleError
from serve.contract.manifest import Manifest, read_bundle
from serve.inference import triton
from serve.inference.backend import Backend, in_batches
from serve.inference.onnxruntime import OnnxRuntimeBackend
from serve.inference.openvino import OpenVinoBackend
from serve.inference.segmenter import open_backend
from serve.inference.triton import TritonBackend, load_on_triton, version_on_triton
from serve.settings import ServeSettings
from tests.support.errors import raises
from tests.support.openvino import needs_openvino, passed_in_openvino
from tests.support.ports import free_port
from tests.support.toy_bundle import TILE_SIZE_PX, write_toy_bundle

OUTPUTS = ("labels", "confidence", "low_res_probabilities", "iou_scores")


@pytest.fixture(scope="module")
def manifest(toy_bundle: Path) -> Manifest:
    return passed_in_openvino(read_bundle(toy_bundle))


@pytest.fixture(scope="module", params=[OnnxRuntimeBackend, OpenVinoBackend])
def kind(request: pytest.FixtureRequest) -> type[OnnxRuntimeBackend] | type[OpenVinoBackend]:
    if request.param is OpenVinoBackend:
        needs_openvino()
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def backend(kind: type[OnnxRuntimeBackend], toy_bundle: Path, manifest: Manifest) -> Backend:
    return kind(toy_bundle, manifest)


def _tiles(count: int) -> NDArray[np.uint8]:
    shape = (count, TILE_SIZE_PX, TILE_SIZE_PX, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def _assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert (found["labels"] == expected["labels"]).mean() > 0.9999
    np.testing.assert_allclose(found["iou_scores"], expected["iou_scores"], atol=1e-5)
    for name in ("confidence", "low_res_probabilities"):
        assert np.abs(found[name].astype(int) - expected[name]).max() <= 1


@pytest.mark.parametrize("size", [1, 3])
def test_the_answers_are_those_of_a_plain_session_in_the_manifests_shapes(
    size: int, backend: Backend, toy_bundle: Path, manifest: Manifest
) -> None:
    session = onnxruntime.InferenceSession(toy_bundle / "model.onnx")
    plain = session.run(list(OUTPUTS), {"image": _tiles(size)})
    answers = backend.infer(_tiles(size), OUTPUTS)
    _assert_close(answers, dict(zip(OUTPUTS, plain, strict=True)))
    if isinstance(backend, OnnxRuntimeBackend):
        assert all(np.array_equal(answers[n], p) for n, p in zip(OUTPUTS, plain, strict=True))
    found = {name: (str(a.dtype), a.shape[1:]) for name, a in answers.items()}
    assert found == {spec.name: (spec.dtype, spec.shape[1:]) for spec in manifest.outputs}


def test_only_the_outputs_that_are_asked_for_come_back(backend: Backend) -> None:
    assert set(backend.infer(_tiles(1), ("iou_scores",))) == {"iou_scores"}


def test_a_batch_over_the_largest_is_split_and_joined_in_order(
    kind: type[OnnxRuntimeBackend], backend: Backend, tmp_path: Path
) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle", max_batch_size=2)
    split = kind(bundle, passed_in_openvino(read_bundle(bundle)))
    _assert_close(split.infer(_tiles(5), OUTPUTS), backend.infer(_tiles(5), OUTPUTS))
    sizes: list[int] = []

    def infer_batch(images: NDArray[np.uint8], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        sizes.append(len(images))
        return {"labels": images[:, 0, 0, 0]}

    found = in_batches(infer_batch, _tiles(5), ("labels",), read_bundle(bundle))
    assert sizes == [2, 2, 1]
    assert np.array_equal(found["labels"], _tiles(5)[:, 0, 0, 0])


def test_a_file_that_is_no_onnx_is_refused(
    kind: type[OnnxRuntimeBackend], manifest: Manifest, tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    runtime = "OpenVINO 20" if kind is OpenVinoBackend else "ONNX Runtime"
    with raises(BundleError, "model.onnx", runtime):
        kind(tmp_path, manifest)


@pytest.mark.parametrize("change", ["tile", "missing", "type"])
def test_a_graph_of_another_interface_than_the_manifests_is_refused(
    kind: type[OnnxRuntimeBackend], change: str, manifest: Manifest, tmp_path: Path
) -> None:
    bundle = write_toy_bundle(tmp_path, tile_size_px=2 * TILE_SIZE_PX if change == "tile" else 64)
    graph = onnx.load(bundle / "model.onnx")
    if change == "missing":
        del graph.graph.output[3]
    elif change == "type":
        graph.graph.node.append(onnx.helper.make_node("Cast", ["labels"], ["deep"], to=6))
        graph.graph.output[0].name = "deep"
        graph.graph.output[0].type.tensor_type.elem_type = 6  # int32
    onnx.save(graph, bundle / "model.onnx")
    with raises(BundleError, "model.onnx", "expected", code="bundle_damaged"):
        kind(bundle, manifest)


def test_a_precision_that_the_bundle_lacks_is_refused(
    kind: type[OnnxRuntimeBackend], toy_bundle: Path, manifest: Manifest
) -> None:
    with raises(BundleError, "fp16", "fp32"):
        kind(toy_bundle, manifest, precision="fp16")


def test_cuda_that_is_not_there_is_refused_and_not_replaced(
    toy_bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with raises(BackendUnavailableError, "CUDA", "CPUExecutionProvider"):
        OnnxRuntimeBackend(toy_bundle, manifest, provider="cuda")


def test_the_settings_choose_the_backend(
    kind: type[OnnxRuntimeBackend], toy_bundle: Path, manifest: Manifest
) -> None:
    provider = "openvino" if kind is OpenVinoBackend else "cpu"
    settings = ServeSettings(bundle=toy_bundle, provider=provider, threads=1)
    opened, runs_on = open_backend(settings, manifest)
    assert (type(opened), runs_on.provider, runs_on.precision) == (kind, provider, "fp32")
    assert opened.is_ready()
    opened.close()


def test_a_triton_that_is_not_there_is_named_with_what_to_do(manifest: Manifest) -> None:
    url = f"127.0.0.1:{free_port()}"
    settings = ServeSettings(backend="triton", triton_url=url)
    with raises(BackendUnreachableError, "Triton", url, "segmenter", "FOCALPATH_TRITON_URL"):
        open_backend(settings, manifest)


def test_a_triton_that_is_slow_has_the_time_that_the_error_names(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "_CHECK_TIMEOUT_S", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        with raises(BackendUnavailableError, url, "within 0.5 s"):
            TritonBackend(url, manifest, timeout_s=0.5)
        assert time.monotonic() - start >= 0.5


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8000",
        "127.0.0.1",
        "localhost:grpc",
        "",
        "h:0",
        "h:65536",
        "h:٨٠٠١",
        "::1:80",
    ],
)
def test_an_address_that_is_no_host_and_port_is_refused(url: str, manifest: Manifest) -> None:
    with raises(BackendUnavailableError, url, "host:port"):
        TritonBackend(url, manifest)


@pytest.mark.parametrize("ask", [load_on_triton, version_on_triton, None])
def test_triton_is_asked_through_no_proxy(
    ask: Callable[..., object] | None, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ServeSettings(triton_url="192.0.2.1:8001", triton_timeout_s=0.2)  # answers never
    with socket.create_server(("127.0.0.1", 0)) as proxy, suppress(BackendUnavailableError):
        proxy.settimeout(0.2)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.setattr(triton, "_CHECK_TIMEOUT_S", 0.2)
        try:
            if ask:
                ask(asked, manifest)
            else:
                TritonBackend(asked.triton_url, manifest, timeout_s=asked.triton_timeout_s)
        finally:
            with pytest.raises(TimeoutError):
                proxy.accept()
