"""What is said where CUDA does not work. `tests/serve/inference/test_cuda.py` has a real GPU."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from serve.contract import cuda
from serve.contract.errors import BackendUnavailableError
from serve.contract.machine import Gpu
from serve.contract.manifest import read_bundle
from serve.inference.onnxruntime import OnnxRuntimeBackend
from tests.support.errors import raises

CALL = (
    "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:154 std::conditional_t<THRW, "
    "void, onnxruntime::common::Status> onnxruntime::CudaCall(ERRTYPE, const char*) [with ERRTYPE "
    "= cudaError; bool THRW = true] {} ; GPU=-1 ; hostname=vm ; file=/onnxruntime_src/onnxruntime/"
    "core/providers/cuda/cuda_execution_provider.cc ; line=355 ; expr=cudaSetDevice(device_id);"
)
"""As ONNX Runtime 1.31 writes it."""
GPU = Gpu(name="A GPU", compute_capability="9.0", memory_mib=81559, driver="580.1")


@pytest.fixture
def built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "is_built_in", lambda: True)
    monkeypatch.setattr(cuda, "load_libraries", lambda: None)
    monkeypatch.setattr(cuda, "visible_gpus", lambda: (GPU,))


def _sessions_raise(monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[dict[str, Any]]:
    asked: list[dict[str, Any]] = []

    def session(*_: object, **settings: Any) -> None:
        asked.append(settings)
        raise error

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return asked


@pytest.mark.usefixtures("built_in")
def test_a_machine_without_a_gpu_is_told_and_the_cpu_does_not_step_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = _sessions_raise(
        monkeypatch, RuntimeError(CALL.format("CUDA failure 100: no CUDA-capable device"))
    )
    monkeypatch.setattr(cuda, "visible_gpus", lambda: ())
    with raises(BackendUnavailableError, "no CUDA-capable device", "nvidia-smi", "cpu"):
        cuda.open_session(Path("model.onnx"))
    assert [settings["enable_fallback"] for settings in asked] == [False]


@pytest.mark.usefixtures("built_in")
def test_a_driver_that_is_too_old_is_named_with_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version"
    _sessions_raise(monkeypatch, RuntimeError(CALL.format(failure)))
    with raises(BackendUnavailableError, f"{failure}.", GPU.name, GPU.driver) as caught:
        cuda.open_session(Path("model.onnx"))
    assert "onnxruntime_src" not in str(caught.value)


@pytest.mark.usefixtures("built_in")
def test_libraries_that_are_missing_are_not_taken_for_cuda(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = onnxruntime.InferenceSession(
        toy_bundle / "model.onnx", providers=["CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: plain)
    with raises(BackendUnavailableError, "cuDNN", GPU.name):
        cuda.open_session(toy_bundle / "model.onnx")


@pytest.mark.parametrize(
    "message",
    [
        CALL.format("CUDA failure 2: out of memory"),
        "bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 1342177280",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED",
    ],
)
@pytest.mark.usefixtures("built_in")
def test_a_full_gpu_fails_one_batch_and_the_next_one_runs(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    manifest = read_bundle(toy_bundle)
    session = onnxruntime.InferenceSession(
        toy_bundle / "model.onnx", providers=["CPUExecutionProvider"]
    )
    run = session.run
    failures = [ort.RuntimeException(message), ort.Fail(message)]

    def fail_first(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return run(*arguments)

    monkeypatch.setattr(session, "run", fail_first)
    monkeypatch.setattr(session, "get_providers", lambda: [cuda.PROVIDER])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: session)
    backend = OnnxRuntimeBackend(toy_bundle, manifest, provider="cuda")
    image = np.zeros((1, manifest.tile_size_px, manifest.tile_size_px, 3), np.uint8)
    for _ in range(2):
        with raises(BackendUnavailableError, "memory is full", "FOCALPATH_MAX_BATCH_SIZE"):
            backend.infer(image, ("labels",))
    assert backend.infer(image, ("labels",))["labels"].shape == image.shape[:3]
