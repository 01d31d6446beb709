"""The service and the doctor on a machine with a GPU; skipped where there is none."""

import io
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from serve.cli import main
from serve.contract.machine import visible_gpus
from serve.doctor.checks import Report
from tests.support.cuda import needs_cuda
from tests.support.http_service import service_process, wait_until_ready
from tests.support.ports import free_port
from tests.support.probes import probe_of

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="session", autouse=True)
def _needs_cuda() -> None:
    """Comes before what takes a while to make, which is of the session, too."""
    needs_cuda()


def test_two_workers_share_the_gpu_and_answer_rightly(toy_bundle: Path, tmp_path: Path) -> None:
    settings = {"provider": "cuda", "workers": "2", "max_waiting": "64"}
    with service_process(toy_bundle, tmp_path / "log.txt", **settings) as (url, _):
        wait_until_ready(url)
        with httpx.Client(timeout=60) as client:
            runtime = client.get(f"{url}/runtime").json()
            assert runtime["provider"] == "cuda", runtime

            def ask(label: int) -> bool:
                probe = probe_of(label, 128)
                answer = client.post(f"{url}/labels", files={"image": ("a.png", probe.image)})
                assert answer.status_code == 200, answer.text
                return bool(
                    np.array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), probe.labels)
                )

            with ThreadPoolExecutor(8) as pool:
                assert all(pool.map(ask, [1, 2, 3, 4, 5] * 12))


def test_the_doctor_names_the_gpu_and_runs_on_it(
    toy_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOCALPATH_PORT", str(free_port()))
    main(["doctor", "--json", "--bundle", str(toy_bundle), "--provider", "cuda"])
    report = Report.model_validate_json(capsys.readouterr().out)
    found = {(f.section, f.name): (f.status, f.detail) for f in report.findings}
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=True,
    )
    name, driver = listed.stdout.splitlines()[0].split(", ")
    assert found["Machine", "GPU"][0] == "ok"
    assert name in found["Machine", "GPU"][1]
    assert driver in found["Machine", "GPU"][1]
    assert found["Providers", "cuda"][0] == "ok"
    status, detail = found["Bundle", "runs on"]
    assert (status, detail.split()[0]) == ("ok", "cuda")
    assert found["Bundle", "warm-up"][0] == "ok"
    assert report.machine.gpus == visible_gpus()
    assert json.loads(report.model_dump_json())["machine"]["gpus"]
