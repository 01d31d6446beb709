"""Running the service before a real Triton server: new versions, traces, metrics."""

import contextlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from export.triton import publish
from serve.cli import main
from serve.client.segment_files import main as segment_files
from serve.client.triton import TritonClient
from serve.contract.errors import BackendUnavailableError, ModelChangedError
from serve.contract.manifest import read_bundle
from serve.inference.segmenter import open_segmenter
from serve.inference.triton import TritonBackend, load_on_triton
from serve.settings import ServeSettings, SharedMemory
from tests.support.callers import calling
from tests.support.deployed import dashboard_queries, metrics_in, metrics_of
from tests.support.errors import raises
from tests.support.http_service import running_service, wait_until_ready
from tests.support.otlp_collector import Collector, running_collector
from tests.support.pictures import blobs, encoded, painted
from tests.support.toy_bundle import (
    TILE_SIZE_PX,
    add_warm_up,
    replace_bundle,
    retrain,
    write_toy_bundle,
)
from tests.support.triton_server import TritonServer

pytestmark = pytest.mark.triton

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TIMEOUT_S = 120.0


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    bundle = write_toy_bundle(tmp_path / "bundle", version="1")
    publish(bundle, tmp_path / "repository")
    return bundle


@pytest.mark.parametrize("mode", ["explicit", "poll"])
def test_a_new_version_is_served_without_losing_a_request(
    bundle: Path, tmp_path: Path, mode: str
) -> None:
    arguments = ["--load-model=*"] if mode == "explicit" else ["--repository-poll-secs=1"]
    triton = TritonServer(
        tmp_path / "repository",
        control_mode=mode,  # type: ignore[arg-type]
        extra_arguments=arguments,
    )
    log = tmp_path / "log.txt"
    with triton:
        settings = {
            "backend": "triton",
            "triton_url": triton.grpc_url,
            "triton_load": str(mode == "explicit"),
            "bundle_poll_s": "0.3",
        }
        with running_service(bundle, log, **settings) as url:
            wait_until_ready(url)
            with calling(url, log) as callers:
                callers.wait_for_version("1")
                for version, tile_size_px in (("2", 128), ("3", 64)):
                    replace_bundle(bundle, version, tile_size_px=tile_size_px)
                    publish(bundle, tmp_path / "repository")
                    callers.wait_for_version(version)
    assert set(callers.seen) == {"1", "2", "3"}


def test_an_answer_of_another_version_is_not_taken_for_one_of_the_models(
    bundle: Path, tmp_path: Path
) -> None:
    images = blobs(TILE_SIZE_PX, TILE_SIZE_PX)[np.newaxis]
    with TritonServer(
        tmp_path / "repository", control_mode="explicit", extra_arguments=["--load-model=*"]
    ) as triton:
        settings = ServeSettings(backend="triton", triton_url=triton.grpc_url)
        with contextlib.closing(TritonBackend(triton.grpc_url, read_bundle(bundle))) as backend:
            assert backend.infer(images, ("labels",))["labels"].shape == images.shape[:3]
            retrain(bundle)
            publish(bundle, tmp_path / "repository")
            load_on_triton(settings, read_bundle(bundle))
            with raises(ModelChangedError, "version 2", "version 1"):
                backend.infer(images, ("labels",))


def test_a_bundle_that_triton_has_not_loaded_yet_waits(bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with TritonServer(tmp_path / "repository") as triton:
        settings = {"backend": "triton", "triton_url": triton.grpc_url, "bundle_poll_s": "0.1"}
        with running_service(bundle, log, **settings) as url:
            wait_until_ready(url)
            replace_bundle(bundle, "2", tile_size_px=128)
            publish(bundle, tmp_path / "repository")
            deadline = time.monotonic() + TIMEOUT_S
            while "the new bundle cannot be opened yet: Triton" not in log.read_text():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            response = httpx.post(f"{url}/segment", files={"image": encoded(blobs(70, 70))})
            assert response.json()["model"]["version"] == "1"
            assert httpx.get(f"{url}/readyz").status_code == 200
    assert log.read_text().count("the new bundle cannot be opened yet") == 1


@pytest.fixture
def checked(tmp_path: Path) -> Path:
    """A bundle with a warm-up image; Triton's repository has another model of its interface."""
    bundle, other = (write_toy_bundle(tmp_path / name) for name in ("bundle", "other"))
    image = painted(np.arange(TILE_SIZE_PX**2).reshape(TILE_SIZE_PX, TILE_SIZE_PX) // 820 % 5 + 1)
    with open_segmenter(ServeSettings(bundle=bundle)) as segmenter:
        add_warm_up(bundle, image, segmenter.segment(image).labels)
    retrain(other)
    publish(other, tmp_path / "repository")
    Image.fromarray(image).save(tmp_path / "image.png", dpi=(50800, 50800))
    return bundle


def _load_from(folder: Path, repository: Path, url: str, bundle: Path) -> None:
    """Make Triton load what a folder has in place of its repository, as a new publication there."""
    shutil.rmtree(repository, ignore_errors=True)
    shutil.copytree(folder, repository, copy_function=shutil.copyfile)  # with new times
    load_on_triton(ServeSettings(backend="triton", triton_url=url), read_bundle(bundle))


def test_no_door_takes_the_answers_of_another_model_of_the_same_interface(
    checked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with TritonServer(tmp_path / "repository") as triton:
        own = ["--backend", "triton", "--triton-url", triton.grpc_url, "--bundle", str(checked)]
        to = [str(tmp_path / "image.png"), "--out", str(tmp_path / "out")]
        for run in (segment_files, lambda words: main(["slides", "run", *words])):
            assert run([*to, *own]) == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert "warm_up.npz" in line
            assert "serves this bundle" in line


def test_a_triton_that_comes_back_with_another_model_of_the_same_number_answers_nothing(
    checked: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    repository.rename(tmp_path / "wrong")
    publish(checked, repository)
    with TritonServer(repository) as triton:
        settings = {"backend": "triton", "triton_url": triton.grpc_url}
        with running_service(checked, tmp_path / "log.txt", **settings) as url:
            wait_until_ready(url)
            files = {"image": (tmp_path / "image.png").read_bytes()}
            labels = httpx.post(f"{url}/labels", files=files).content
            triton.kill()
            repository.rename(tmp_path / "right")
            (tmp_path / "wrong").rename(repository)
            assert httpx.post(f"{url}/labels", files=files).status_code == 503
            triton.start()
            wait_until_ready(url, status=503)
            assert "warm_up_differs" in httpx.post(f"{url}/labels", files=files).text
            triton.kill()
            repository.rename(tmp_path / "wrong")
            (tmp_path / "right").rename(repository)
            triton.start()
            wait_until_ready(url)
            assert httpx.post(f"{url}/labels", files=files).content == labels


@pytest.mark.parametrize("shared_memory", ["on", "off"])
@pytest.mark.parametrize("num_answered", [1, 20])
def test_another_model_that_triton_loads_under_the_same_number_answers_nothing(
    checked: Path, tmp_path: Path, num_answered: int, shared_memory: SharedMemory
) -> None:
    """As after `rm -r` of the repository and a new publication, while Triton is up all the time."""
    wrong, right, repository = (tmp_path / name for name in ("repository", "right", "served"))
    publish(checked, right)
    shutil.copytree(right, repository)
    image = blobs(3 * TILE_SIZE_PX, 3 * TILE_SIZE_PX)
    with TritonServer(
        repository, control_mode="explicit", extra_arguments=["--load-model=*"]
    ) as triton:
        options = {"bundle": checked, "shared_memory": shared_memory}
        url, manifest = triton.grpc_url, read_bundle(checked)
        with TritonClient(url, manifest, **options) as client:  # type: ignore[arg-type]
            found = [client.segment(image).labels for _ in range(num_answered)]
            _load_from(right, repository, url, checked)
            found.append(client.segment(image).labels)
            _load_from(wrong, repository, url, checked)
            for _ in range(2):
                with raises(ModelChangedError, "warm-up image"):
                    client.segment(image)
            _load_from(right, repository, url, checked)
            found.append(client.segment(image).labels)
    assert all(np.array_equal(labels, found[0]) for labels in found)


def test_the_service_refuses_another_model_that_triton_loads_under_the_same_number(
    checked: Path, tmp_path: Path
) -> None:
    wrong, repository = tmp_path / "repository", tmp_path / "served"
    publish(checked, repository)
    files = {"image": (tmp_path / "image.png").read_bytes()}
    with TritonServer(
        repository, control_mode="explicit", extra_arguments=["--load-model=*"]
    ) as triton:
        settings = {"backend": "triton", "triton_url": triton.grpc_url}
        with running_service(checked, tmp_path / "log.txt", **settings) as url:
            wait_until_ready(url)
            assert httpx.post(f"{url}/labels", files=files).status_code == 200
            _load_from(wrong, repository, triton.grpc_url, checked)
            for _ in range(2):
                answer = httpx.post(f"{url}/labels", files=files)
                assert answer.status_code == 503
                assert "warm_up_differs" in answer.text


@pytest.mark.parametrize("shared_memory", ["on", "off"])
def test_a_triton_that_hangs_ends_in_an_error_within_seconds(
    bundle: Path, tmp_path: Path, shared_memory: SharedMemory
) -> None:
    images = blobs(TILE_SIZE_PX, TILE_SIZE_PX)[np.newaxis]
    with TritonServer(tmp_path / "repository") as triton:
        backend = TritonBackend(triton.grpc_url, read_bundle(bundle), shared_memory=shared_memory)
        with contextlib.closing(backend):
            backend.infer(images, ("labels",))
            backend._timeout_s = 2
            triton.freeze()
            for _ in range(2):
                started = time.monotonic()
                with raises(BackendUnavailableError, "did not answer within 2 s"):
                    backend.infer(images, ("labels",))
                assert time.monotonic() - started < 60


@dataclass(frozen=True)
class Running:
    """Triton and a service before it; both send their traces to the collector."""

    triton: TritonServer
    url: str
    log: Path
    collector: Collector


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("running")
    bundle, log = write_toy_bundle(folder / "bundle"), folder / "log.txt"
    publish(bundle, folder / "repository")
    with running_collector() as collector, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        traced = [
            "--trace-config=mode=opentelemetry",
            "--trace-config=rate=1",
            "--trace-config=level=TIMESTAMPS",
            f"--trace-config=opentelemetry,url={collector.url}",
            "--trace-config=opentelemetry,resource=service.name=triton",
            "--trace-config=opentelemetry,bsp_schedule_delay=100",
        ]
        with TritonServer(folder / "repository", extra_arguments=traced) as triton:
            settings = {"backend": "triton", "triton_url": triton.grpc_url}
            settings["otlp_endpoint"] = collector.url
            with running_service(bundle, log, **settings) as url:
                wait_until_ready(url)
                yield Running(triton, url, log, collector)


def test_a_trace_goes_through_to_triton(running: Running) -> None:
    httpx.post(
        f"{running.url}/segment",
        files={"image": encoded(blobs(20, 20))},
        headers={"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"},
    )
    infer = running.collector.wait_for("focalpath", "infer", trace_id=TRACE_ID)
    inside = running.collector.wait_for("triton", "InferRequest", trace_id=TRACE_ID)
    assert inside.parent_span_id == infer.span_id


def test_every_query_of_the_dashboard_finds_series_of_triton(running: Running) -> None:
    metrics = httpx.get(f"http://127.0.0.1:{running.triton.metrics_port}/metrics").text
    named = metrics_in(dashboard_queries(), "nv_")
    assert named
    assert named <= metrics_of(metrics)


def test_the_tiles_that_triton_gets_are_counted(running: Running) -> None:
    def count() -> float:
        metrics = httpx.get(f"{running.url}/metrics").text
        found = re.search(r"^focalpath_batch_size_sum (\S+)$", metrics, re.MULTILINE)
        assert found is not None
        return float(found[1])

    before = count()
    headers = {"X-Request-ID": "four-tiles"}
    files = {"image": encoded(blobs(100, 100))}
    httpx.post(f"{running.url}/segment", files=files, headers=headers)
    assert count() - before == 4
    entries = [json.loads(line) for line in running.log.read_text().splitlines()[2:]]
    (answered,) = [e for e in entries if e.get("request_id") == "four-tiles"]
    assert "infer_ms" in answered
