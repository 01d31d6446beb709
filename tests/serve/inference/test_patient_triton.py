"""What several threads notice of a Triton that restarts, without one."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from serve.contract.errors import BackendUnreachableError, ModelChangedError
from serve.contract.manifest import read_bundle
from serve.inference.patient_triton import PatientTriton
from serve.inference.triton import TritonBackend
from tests.support.errors import raises

ONE_TILE = np.zeros((1, 64, 64, 3), np.uint8), ("labels",)


@pytest.fixture
def patient(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> PatientTriton:
    monkeypatch.setattr(TritonBackend, "_check_interface", lambda _: "1")
    monkeypatch.setattr(TritonBackend, "_count_tiles", lambda _: None)
    monkeypatch.setattr(TritonBackend, "infer", lambda *_: {})
    return PatientTriton("triton:1", read_bundle(toy_bundle), bundle=None, patience_s=0)


def lose(*_: object) -> None:
    raise BackendUnreachableError("Triton is not reachable.")


def test_a_triton_that_is_lost_again_while_it_is_compared_is_compared_again(
    patient: PatientTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[None] = []
    begun, go_on = threading.Event(), threading.Event()

    def lose_later(*_: object) -> None:
        begun.set()
        assert go_on.wait(60)
        lose()

    with ThreadPoolExecutor(1) as threads:
        with monkeypatch.context() as patch:
            patch.setattr(TritonBackend, "infer", lose_later)
            other = threads.submit(patient.infer, *ONE_TILE)
            assert begun.wait(60)
            patch.setattr(TritonBackend, "infer", lose)
            with raises(BackendUnreachableError):
                patient.infer(*ONE_TILE)

        def compare() -> None:
            compared.append(None)
            go_on.set()
            assert isinstance(other.exception(60), BackendUnreachableError)

        monkeypatch.setattr(patient, "_compare", compare)
        for _ in range(3):
            patient.infer(*ONE_TILE)
    assert len(compared) == 2


def test_a_triton_with_another_model_is_compared_until_it_has_the_right_one(
    patient: PatientTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(TritonBackend, "infer", lose)
        with raises(BackendUnreachableError):
            patient.infer(*ONE_TILE)
    with monkeypatch.context() as patch:
        patch.setattr(TritonBackend, "_check_interface", lambda _: "2")
        for _ in range(2):
            with raises(ModelChangedError, "version 2"):
                patient.infer(*ONE_TILE)
    assert patient.infer(*ONE_TILE) == {}
