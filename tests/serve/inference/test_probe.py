import subprocess
import sys
from typing import get_args

import onnx
import pytest

from serve.contract.errors import BackendUnavailableError
from serve.contract.tiny_graph import TINY_GRAPH
from serve.inference import probe as module
from serve.inference.probe import PROVIDERS, check_provider, probe
from serve.settings import InferenceSettings, Provider
from tests.support.errors import raises
from tests.support.openvino import needs_openvino


def test_the_graph_is_a_valid_one() -> None:
    model = onnx.load_model_from_string(TINY_GRAPH)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Cast", "MatMul", "ArgMax", "Cast"]


def test_the_cpu_runs_it() -> None:
    found = probe("cpu")
    assert found.problem is None
    assert found.seconds is not None
    assert found.runtime
    assert found.runtime.startswith("ONNX Runtime ")


@pytest.mark.slow
def test_openvino_runs_it() -> None:
    needs_openvino()
    found = probe("openvino")
    assert found.problem is None
    assert found.runtime
    assert found.runtime.startswith("OpenVINO ")


def test_what_the_installed_runtime_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.contract.cuda.is_built_in", lambda: False)
    found = module.run_here("cuda", "fp32")
    assert found.seconds is None
    assert "CUDA" in str(found.problem)


def test_a_wrong_answer_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    run = module._in_onnxruntime
    monkeypatch.setattr(module, "_in_onnxruntime", lambda *arguments: run(*arguments) + 1)
    assert module.run_here("cpu", "fp32").problem == "it runs, and answers wrongly."


def test_a_process_that_is_killed_by_its_provider_is_a_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = subprocess.run

    def killed(command: list[str], **options: object) -> object:
        program = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
        return run([sys.executable, "-c", program], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", killed)
    assert "status -4" in str(probe("cpu").problem)


@pytest.mark.parametrize("provider", ["auto", "cpu"])
def test_what_always_works_is_not_tried(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "probe", lambda *_: pytest.fail("tried"))
    check_provider(InferenceSettings(provider=provider))  # type: ignore[arg-type]


def test_a_named_provider_that_does_not_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = module._failed("cuda", "no GPU.")
    monkeypatch.setattr(module, "probe", lambda *_: failed)
    with raises(BackendUnavailableError, "cuda", "no GPU"):
        check_provider(InferenceSettings(provider="cuda"))


def test_all_providers_of_the_settings_can_be_tried() -> None:
    assert {"auto", *PROVIDERS} == set(get_args(Provider))
