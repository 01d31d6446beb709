import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from serve.contract import openvino as runtime
from serve.contract.errors import BackendUnavailableError, BundleError
from serve.contract.machine import this_processor
from serve.contract.manifest import Manifest, read_bundle
from serve.inference.openvino import OpenVinoBackend
from tests.support import ROOT
from tests.support.errors import raises
from tests.support.openvino import forget_openvino, needs_openvino, passed_in_openvino
from tests.support.toy_bundle import TILE_SIZE_PX


@pytest.fixture(scope="module")
def manifest(toy_bundle: Path) -> Manifest:
    return passed_in_openvino(read_bundle(toy_bundle))


@pytest.fixture(scope="module")
def backend(toy_bundle: Path, manifest: Manifest) -> OpenVinoBackend:
    needs_openvino()
    return OpenVinoBackend(toy_bundle, manifest, threads=1, parallel=2)


def _tiles(count: int, seed: int = 0) -> np.ndarray:
    shape = (count, TILE_SIZE_PX, TILE_SIZE_PX, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_an_answer_stays_as_it_is_when_the_next_batch_runs(backend: OpenVinoBackend) -> None:
    first = backend.infer(_tiles(1), ("labels",))["labels"]
    before = first.copy()
    backend.infer(_tiles(1, seed=1), ("labels",))
    np.testing.assert_array_equal(first, before)


def test_threads_get_the_answers_to_their_own_tiles(backend: OpenVinoBackend) -> None:
    tiles = [_tiles(1 + seed % 3, seed) for seed in range(24)]
    expected = [backend.infer(batch, ("labels",))["labels"] for batch in tiles]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda batch: backend.infer(batch, ("labels",))["labels"], tiles)
    assert all(np.array_equal(f, e) for f, e in zip(found, expected, strict=True))


def test_what_did_not_pass_in_it_is_refused(toy_bundle: Path) -> None:
    with raises(BundleError, "model.onnx", "--openvino"):
        OpenVinoBackend(toy_bundle, read_bundle(toy_bundle))


def test_it_sends_no_usage_data_and_leaves_the_home_folder_alone(tmp_path: Path) -> None:
    needs_openvino()
    script = "from serve.contract import openvino; print(openvino.problem('fp32'))"
    of_tests = ("CI", "TF_BUILD", "JENKINS_URL")  # where OpenVINO sends nothing by itself
    environment = {name: value for name, value in os.environ.items() if name not in of_tests}
    for home in (tmp_path, tmp_path / "none"):
        finished = subprocess.run(
            [sys.executable, "-c", script],
            env={**environment, "HOME": str(home)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert (finished.stdout, finished.stderr) == ("None\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def _looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_openvino(monkeypatch)


@pytest.mark.usefixtures("_looked_for_again")
def test_a_missing_package_is_named_with_the_command(
    toy_bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with raises(BackendUnavailableError, "pip install openvino"):
        OpenVinoBackend(toy_bundle, manifest)


class OldProcessor:
    """OpenVINO's core on a processor without bfloat16."""

    available_devices = ("CPU",)

    def get_property(self, device: str, name: str) -> object:
        return {
            "FULL_DEVICE_NAME": "An old processor",
            "OPTIMIZATION_CAPABILITIES": ["FP32", "INT8"],
        }[name]


@pytest.mark.usefixtures("_looked_for_again")
def test_bfloat16_on_a_processor_without_it_is_refused(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_core", OldProcessor)
    with raises(BackendUnavailableError, "An old processor", "bfloat16"):
        runtime.OpenVinoModel(toy_bundle / "model.onnx", "bf16")
    monkeypatch.undo()


def test_a_runtime_that_computes_wrongly_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_openvino()
    monkeypatch.setattr(runtime, "tiny_images", lambda: np.zeros((2, 4, 4, 3), np.uint8))
    assert "computes wrongly" in str(runtime.problem.__wrapped__("fp32"))


@pytest.mark.usefixtures("_looked_for_again")
@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_a_mask_that_only_a_part_of_it_obeys_is_refused_before_anything_runs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "avx2")
    old = this_processor().model_copy(update={"instruction_sets": ("avx2",)})
    for sets, is_refused in ((("avx2", "avx512"), True), (("avx2",), False)):
        forget_openvino(monkeypatch)
        chip = old.model_copy(update={"instruction_sets": sets})
        monkeypatch.setattr(runtime, "this_processor", lambda chip=chip: chip)
        monkeypatch.setattr(runtime, "_module", lambda: SimpleNamespace(Core=OldProcessor))
        found = str(runtime.problem("bf16"))
        assert (f"{name}=avx2" in found) == is_refused
        assert ("An old processor" in found) != is_refused


@pytest.mark.usefixtures("_looked_for_again")
def test_threads_that_ask_at_once_share_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    cores: list[OldProcessor] = []

    class Core(OldProcessor):
        def __init__(self) -> None:
            cores.append(self)
            if len(cores) == 1:
                other.start()
                other.join(0.2)  # it waits for this core

    other = threading.Thread(target=runtime._core)
    monkeypatch.setattr(runtime, "_module", lambda: SimpleNamespace(Core=Core))
    monkeypatch.setattr(runtime, "_refuse_mask", lambda: None)
    core = runtime._core()
    other.join()
    assert cores == [core]


def test_a_processor_that_has_bfloat16_runs_a_graph_in_it(toy_bundle: Path) -> None:
    needs_openvino("bf16")
    model = runtime.OpenVinoModel(toy_bundle / "model.onnx", "bf16", threads=1)
    expected = runtime.OpenVinoModel(toy_bundle / "model.onnx", "fp32", threads=1)
    found, labels = (m.run(_tiles(2), ("labels",))["labels"] for m in (model, expected))
    assert (found == labels).mean() > 0.99


_SIGNAL_AFTER_TWO_MODELS = """
import gc, os, signal, sys
from pathlib import Path
from serve.contract.openvino import OpenVinoModel

first, second = (OpenVinoModel(Path(sys.argv[1]), "fp32", threads=1) for _ in range(2))
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("received"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.mark.slow
def test_a_signal_after_models_are_closed_in_their_order_kills_no_process(toy_bundle: Path) -> None:
    needs_openvino()
    command = [sys.executable, "-c", _SIGNAL_AFTER_TWO_MODELS, str(toy_bundle / "model.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "received\n"), done.stderr
