import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.contract.errors import BackendUnavailableError, BundleError
from serve.contract.machine import this_processor
from serve.contract.manifest import Artefact, Manifest, Proof, WarmUp, read_bundle, sha256_of
from serve.inference import providers
from serve.inference.backend import RunsOn
from serve.inference.providers import candidates_for, open_in_process
from serve.inference.trial import HOME_VARIABLE
from serve.settings import InferenceSettings
from tests.support.errors import raises
from tests.support.openvino import forget_openvino
from tests.support.pictures import painted
from tests.support.toy_bundle import TILE_SIZE_PX

LABELS = np.repeat([[1, 2, 3, 4]], 4, axis=0).repeat(TILE_SIZE_PX // 4, 0).repeat(16, 1)
HERE = this_processor().kind


class FakeBackend:
    """Takes `seconds` of the machine's clock for a batch, and gives a share of labels wrongly."""

    def __init__(self, machine: "Machine", seconds: float, wrong: float) -> None:
        self._machine, self._seconds = machine, seconds
        self._labels = LABELS.astype(np.uint8).copy()
        self._labels.ravel()[: int(wrong * LABELS.size)] = 5
        self.is_open = True

    def infer(self, images: np.ndarray, outputs: Sequence[str]) -> dict[str, Any]:
        self._machine.now_s += self._seconds
        return {"labels": self._labels[None]}

    def is_ready(self) -> bool:
        return self.is_open

    def close(self) -> None:
        self.is_open = False


class Machine:
    """A machine whose providers take so many seconds for a tile; None: it does not open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds: dict[tuple[str, str], float | None] = {}
        self.wrong: dict[tuple[str, str], float] = {}
        self.opened: list[tuple[tuple[str, str], FakeBackend]] = []
        self.now_s = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now_s)
        monkeypatch.setattr(providers, "_open_backend", self._open)
        monkeypatch.setattr("serve.contract.cuda.is_built_in", lambda: False)
        monkeypatch.setattr("serve.contract.openvino.problem", lambda precision: None)
        monkeypatch.setattr("serve.contract.openvino.version", lambda: "2026.4.1")

    def _open(
        self, settings: InferenceSettings, manifest: Manifest, provider: str, precision: str
    ) -> FakeBackend:
        seconds = self.seconds[provider, precision]
        if seconds is None:
            raise BackendUnavailableError(f"no {provider} here")
        backend = FakeBackend(self, seconds, self.wrong.get((provider, precision), 0.0))
        self.opened.append(((provider, precision), backend))
        return backend


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def _artefact(artefact: Artefact, precision: str, **processors: str | None) -> Artefact:
    """The artefact in another precision, proven on one kind of processor per provider."""
    proofs = tuple(
        Proof(provider=provider, processor=kind, runtime=None, parity=artefact.parity)  # type: ignore[arg-type]
        for provider, kind in processors.items()
    )
    changes = {"precision": precision, "proofs": proofs, "min_agreement": 0.995}
    return artefact.model_copy(update=changes)


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    np.savez(tmp_path / "warm_up.npz", image=painted(LABELS), labels=LABELS.astype(np.uint8))
    return tmp_path


@pytest.fixture
def manifest(toy_bundle: Path, bundle: Path) -> Manifest:
    """Of a bundle that has passed in all that CPUs have, on this kind of processor."""
    manifest = read_bundle(toy_bundle)
    (fp32,) = manifest.artefacts
    artefacts = (
        _artefact(fp32, "fp32", cpu=HERE, openvino=HERE),
        _artefact(fp32, "fp16", cpu=HERE),
        _artefact(fp32, "bf16", openvino=HERE),
        _artefact(fp32, "int8", cpu=HERE),
    )
    warm_up = WarmUp(
        file="warm_up.npz", sha256=sha256_of(bundle / "warm_up.npz"), min_agreement=0.9
    )
    return manifest.model_copy(update={"artefacts": artefacts, "warm_up": warm_up})


def _on_another_processor(manifest: Manifest) -> Manifest:
    text = manifest.model_dump_json().replace(json.dumps(HERE), '"x86_64 Other"')
    return Manifest.model_validate_json(text)


def _chosen(bundle: Path, manifest: Manifest, **settings: Any) -> RunsOn:
    return open_in_process(InferenceSettings(bundle=bundle, **settings), manifest)[1]


@pytest.mark.parametrize(
    ("cpu", "openvino", "provider"), [(2.0, 1.0, "openvino"), (1.0, 2.0, "cpu")]
)
def test_auto_takes_what_is_fastest_here_says_why_and_leaves_nothing_else_open(
    machine: Machine,
    bundle: Path,
    manifest: Manifest,
    cpu: float,
    openvino: float,
    provider: str,
) -> None:
    machine.seconds = {("cpu", "fp32"): cpu, ("openvino", "fp32"): openvino}
    runs_on = _chosen(bundle, manifest)
    assert (runs_on.provider, runs_on.precision) == (provider, "fp32")
    assert {trial.provider: trial.seconds for trial in runs_on.trials} == {
        "cpu": cpu,
        "openvino": openvino,
    }
    assert "cpu in fp32 takes" in runs_on.reason
    assert HERE in runs_on.processor
    assert [name for name, backend in machine.opened if backend.is_open] == [(provider, "fp32")]


def test_another_precision_competes_only_where_it_is_asked_for(
    machine: Machine, bundle: Path, manifest: Manifest
) -> None:
    machine.seconds = {
        ("cpu", "fp32"): 4.0,
        ("cpu", "int8"): 2.0,
        ("openvino", "fp32"): 3.0,
        ("openvino", "bf16"): 1.0,
    }
    assert _chosen(bundle, manifest).precision == "fp32"
    assert _chosen(bundle, manifest, precision="auto").precision == "bf16"
    named = _chosen(bundle, manifest, precision="auto", provider="cpu")
    assert (named.provider, named.precision) == ("cpu", "int8")


@pytest.mark.parametrize(("wrong", "provider"), [(0.0, "openvino"), (0.03, "cpu")])
def test_on_another_kind_of_processor_a_provider_has_to_prove_itself(
    machine: Machine, bundle: Path, manifest: Manifest, wrong: float, provider: str
) -> None:
    machine.seconds = {("cpu", "fp32"): 2.0, ("openvino", "fp32"): 1.0}
    machine.wrong = {("openvino", "fp32"): wrong}
    # Here the gate proved it: 97% of the labels are enough for the warm-up image.
    assert _chosen(bundle, manifest).provider == "openvino"
    runs_on = _chosen(bundle, _on_another_processor(manifest))
    assert runs_on.provider == provider
    assert not any(trial.is_proven for trial in runs_on.trials)


def test_without_a_warm_up_image_another_kind_of_processor_gets_what_needs_no_proof(
    machine: Machine, bundle: Path, manifest: Manifest
) -> None:
    machine.seconds = {("cpu", "fp32"): 2.0, ("openvino", "fp32"): 1.0}
    unproven = _on_another_processor(manifest).model_copy(update={"warm_up": None})
    runs_on = _chosen(bundle, unproven)
    assert runs_on.provider == "cpu"
    assert "no warm-up image" in str(runs_on.trials[1].problem)


def test_a_named_provider_that_cannot_prove_itself_is_refused(
    machine: Machine, bundle: Path, manifest: Manifest
) -> None:
    machine.seconds = {("openvino", "fp32"): 1.0}
    machine.wrong = {("openvino", "fp32"): 0.03}
    assert _chosen(bundle, manifest, provider="openvino").provider == "openvino"
    with raises(BundleError, "openvino in fp32"):
        _chosen(bundle, _on_another_processor(manifest), provider="openvino")
    assert not machine.opened[-1][1].is_open


def test_a_single_candidate_is_not_timed(
    machine: Machine, bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.contract.openvino.problem", lambda precision: "missing")
    machine.seconds = {("cpu", "fp32"): 2.0}
    runs_on = _chosen(bundle, manifest)
    assert (runs_on.provider, runs_on.trials) == ("cpu", ())


def test_a_gpu_that_works_is_taken_and_the_cpu_not_timed(
    machine: Machine, bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.contract.cuda.is_built_in", lambda: True)
    machine.seconds = {
        ("cuda", "fp32"): 0.1,
        ("cpu", "fp32"): 2.0,
        ("openvino", "fp32"): 1.0,
    }
    runs_on = _chosen(bundle, manifest)
    assert runs_on.provider == "cuda"
    assert [trial.provider for trial in runs_on.trials] == ["cuda"]
    machine.seconds["cuda", "fp32"] = None
    assert _chosen(bundle, manifest).provider == "openvino"


def test_a_new_version_stays_on_what_the_one_before_ran_on(
    machine: Machine, bundle: Path, manifest: Manifest
) -> None:
    machine.seconds = {("cpu", "fp32"): 1.0, ("openvino", "fp32"): 2.0}
    before = _chosen(bundle, manifest, provider="openvino")
    settings = InferenceSettings(bundle=bundle)
    _, runs_on = open_in_process(settings, manifest, before)
    assert (runs_on.provider, runs_on.trials) == ("openvino", ())


def test_the_processes_of_a_service_choose_once(
    machine: Machine, bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = bundle / "home"
    home.mkdir()
    monkeypatch.setenv(HOME_VARIABLE, str(home))
    machine.seconds = {("cpu", "fp32"): 1.0, ("openvino", "fp32"): 2.0}
    first = _chosen(bundle, manifest)
    machine.seconds = {("cpu", "fp32"): 3.0, ("openvino", "fp32"): 2.0}
    assert _chosen(bundle, manifest) == first
    (written,) = home.glob("*.json")
    written.write_bytes(written.read_bytes()[:-9])  # its process was killed
    assert _chosen(bundle, manifest).provider == "openvino"


def test_bf16_has_no_provider_but_openvino(
    machine: Machine, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = InferenceSettings(precision="bf16")
    assert [c.title for c in candidates_for(settings, manifest)] == ["openvino in bf16"]
    monkeypatch.setattr("serve.contract.openvino.problem", lambda precision: "missing")
    with raises(BundleError, "bf16"):
        candidates_for(settings, manifest)


def test_what_does_not_open_is_left_out_and_where_nothing_is_right_the_error_has_every_reason(
    machine: Machine, bundle: Path, manifest: Manifest
) -> None:
    machine.seconds = {("cpu", "fp32"): 2.0, ("openvino", "fp32"): None}
    runs_on = _chosen(bundle, manifest)
    assert (runs_on.provider, runs_on.trials[1].problem) == ("cpu", "no openvino here")
    assert runs_on.reason.endswith("s for a tile; openvino in fp32 was left out: no openvino here")
    machine.wrong = {("cpu", "fp32"): 0.5}
    with raises(BundleError, "cpu in fp32: 50.000%", "no openvino here"):
        _chosen(bundle, manifest)


def test_without_openvino_auto_runs_on_the_cpu(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_openvino(monkeypatch)
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr("serve.contract.cuda.is_built_in", lambda: False)
    manifest = read_bundle(toy_bundle)
    artefacts = (_artefact(manifest.artefacts[0], "fp32", cpu=HERE, openvino=HERE),)
    passed = manifest.model_copy(update={"artefacts": artefacts})
    runs_on = _chosen(toy_bundle, passed, threads=1)
    assert (runs_on.provider, runs_on.trials) == ("cpu", ())


@pytest.mark.parametrize("provider", ["cpu", "openvino"])
@pytest.mark.parametrize(("threads", "quota", "expected"), [(0, 3, 3), (0, 0, 0), (2, 3, 2)])
def test_an_inference_takes_no_more_threads_than_its_container_has_cpus(
    provider: str,
    threads: int,
    quota: int,
    expected: int,
    toy_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(providers, "cpu_quota", lambda: quota)
    for kind in ("OnnxRuntimeBackend", "OpenVinoBackend"):
        monkeypatch.setattr(providers, kind, lambda *_, **options: options["threads"])
    settings = InferenceSettings(threads=threads)
    found = providers._open_backend(settings, read_bundle(toy_bundle), provider, "fp32")
    assert found == expected
