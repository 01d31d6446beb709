from pathlib import Path

import httpx
import pytest

from serve.contract.machine import this_processor
from serve.contract.manifest import Proof, read_bundle
from serve.inference.backend import RunsOn
from tests.support.http_service import running_service, wait_for_workers
from tests.support.openvino import needs_openvino
from tests.support.pictures import blobs, encoded
from tests.support.toy_bundle import write_toy_bundle


def test_the_service_says_what_the_model_runs_on(service_url: str) -> None:
    runs_on = RunsOn.model_validate_json(httpx.get(f"{service_url}/runtime").content)
    assert runs_on.provider in ("cpu", "cuda")
    assert runs_on.precision == "fp32"
    assert this_processor().kind in runs_on.processor
    assert runs_on.reason


@pytest.mark.slow
def test_all_workers_run_on_what_the_first_one_found_fastest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_openvino()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of a GPU, the CPU's providers are not tried
    bundle = write_toy_bundle(tmp_path / "bundle")
    manifest = read_bundle(bundle)
    (artefact,) = manifest.artefacts
    kind = this_processor().kind
    proofs = tuple(
        Proof(provider=provider, processor=kind, parity=artefact.parity)
        for provider in ("cpu", "openvino")
    )
    artefact = artefact.model_copy(update={"proofs": proofs})
    manifest.model_copy(update={"artefacts": (artefact,)}).write(bundle)
    log = tmp_path / "log.txt"
    with running_service(bundle, log, workers="2", threads="1", log_format="text") as url:
        wait_for_workers(log, 2)
        answers = {httpx.get(f"{url}/runtime").text for _ in range(30)}
        assert httpx.post(f"{url}/labels", files={"image": encoded(blobs(80, 90))}).is_success
    (answer,) = answers
    trials = RunsOn.model_validate_json(answer).trials
    assert {trial.provider for trial in trials if trial.problem is None} == {"cpu", "openvino"}
    assert log.read_text(encoding="utf-8").count("the fastest here") == 2
