"""The real service in a process of its own: how it starts, changes its model, and stops."""

import contextlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.support.callers import calling
from tests.support.http_service import (
    running_service,
    service_process,
    wait_for_workers,
    wait_until_ready,
)
from tests.support.otlp_collector import Collector, running_collector
from tests.support.pictures import blobs, encoded
from tests.support.toy_bundle import replace_bundle, write_toy_bundle

KEY = "0123456789abcdef-of-alice"
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
_TIMEOUT_S = 120.0
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Guarded:
    """A service of two workers that asks for a key, sends traces, and may write to one folder."""

    url: str
    log: Path
    home: Path
    bundle: Path
    collector: Collector

    def entries(self) -> list[dict[str, Any]]:
        """The log: all of it, from the first line, is JSON."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture(scope="module")
def guarded(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys").write_text(f"alice:{KEY}\n")
    bundle = shutil.copytree(toy_bundle, folder / "bundle")
    settings = {"workers": "2", "api_keys_file": str(folder / "keys"), "threads": "1"}
    with running_collector() as collector, pytest.MonkeyPatch.context() as patch:
        for variable in ("HOME", "TMPDIR"):
            (folder / variable).mkdir()
            patch.setenv(variable, str(folder / variable))
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        settings["otlp_endpoint"] = collector.url
        with running_service(bundle, folder / "log.txt", **settings) as url:
            wait_for_workers(folder / "log.txt", 2)
            yield Guarded(url, folder / "log.txt", folder / "HOME", bundle, collector)


def _segment(url: str, image: np.ndarray, **headers: str) -> httpx.Response:
    files = {"image": ("tile.png", encoded(image))}
    return httpx.post(f"{url}/segment", files=files, headers=headers, timeout=60)


def _value(metrics: str, name: str) -> float:
    values = re.findall(rf"^{re.escape(name)} (\S+)$", metrics, re.MULTILINE)
    assert len(values) == 1, (name, values)
    return float(values[0])


def test_who_has_no_key_gets_a_401_and_who_has_one_an_answer(guarded: Guarded) -> None:
    assert _segment(guarded.url, blobs(20, 20)).status_code == 401
    assert _segment(guarded.url, blobs(20, 20), **{"X-API-Key": KEY}).status_code == 200


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/"])
def test_monitors_and_the_page_need_no_key(guarded: Guarded, path: str) -> None:
    assert httpx.get(f"{guarded.url}{path}").status_code == 200


def test_metrics_add_up_over_the_workers(guarded: Guarded) -> None:
    name = 'focalpath_requests_total{endpoint="/confidence",status="200"}'
    files = {"image": ("tile.png", encoded(blobs(20, 20)))}
    for _ in range(12):  # each on a connection of its own: either worker may take it
        headers = {"X-API-Key": KEY}
        assert httpx.post(f"{guarded.url}/confidence", files=files, headers=headers).is_success

    def count() -> float:
        return _value(httpx.get(f"{guarded.url}/metrics").text, name)

    _wait_for(lambda: count() >= 12)  # a worker counts after it has answered
    assert [count() for _ in range(4)] == [12] * 4


def test_every_stage_of_an_answer_is_in_the_metrics(guarded: Guarded) -> None:
    stages = ("queue", "decode", "segment", "batch", "infer", "encode")

    def counts() -> list[float]:
        metrics = httpx.get(f"{guarded.url}/metrics").text
        return [_value(metrics, f'focalpath_stage_seconds_count{{stage="{s}"}}') for s in stages]

    _segment(guarded.url, blobs(20, 20), **{"X-API-Key": KEY})
    before = counts()
    _segment(guarded.url, blobs(100, 100), **{"X-API-Key": KEY})
    assert np.subtract(counts(), before).tolist()[:4] == [1, 1, 1, 4]  # four tiles wait
    assert all(np.subtract(counts(), before) >= 1)


def test_the_log_names_the_key_but_never_shows_it(guarded: Guarded) -> None:
    for key, request_id in ((KEY, "run-7"), (f"{KEY}-wrong", "run-8")):
        headers = {"X-API-Key": key, "X-Request-ID": request_id}
        _segment(guarded.url, blobs(20, 20), **headers)

    def answered() -> dict[str, dict[str, Any]]:
        entries = guarded.entries()
        return {entry["request_id"]: entry for entry in entries if entry["message"] == "answered"}

    _wait_for(lambda: {"run-7", "run-8"} <= answered().keys())
    assert "is served at http://127.0.0.1:" in guarded.entries()[0]["message"]
    known, refused = answered()["run-7"], answered()["run-8"]
    assert (known["status"], known["key"]) == (200, "alice")
    assert {"queue_ms", "decode_ms", "segment_ms", "encode_ms"} < set(known)
    assert refused["status"] == 401
    assert "key" not in refused
    assert KEY not in guarded.log.read_text()


def test_the_spans_of_a_request_are_sent_in_the_callers_trace(guarded: Guarded) -> None:
    traceparent = f"00-{TRACE_ID}-00f067aa0ba902b7-01"
    _segment(guarded.url, blobs(20, 20), **{"X-API-Key": KEY, "traceparent": traceparent})
    server = guarded.collector.wait_for("focalpath", "POST /segment", trace_id=TRACE_ID)
    decode = guarded.collector.wait_for("focalpath", "decode", trace_id=TRACE_ID)
    assert server.parent_span_id == "00f067aa0ba902b7"
    assert decode.parent_span_id == server.span_id
    assert server.attributes["http.response.status_code"] == 200


def test_only_the_temporary_folder_is_written_to(guarded: Guarded, toy_bundle: Path) -> None:
    assert _segment(guarded.url, blobs(20, 20), **{"X-API-Key": KEY}).status_code == 200
    assert list(guarded.home.iterdir()) == []
    names = {path.name for path in toy_bundle.iterdir()}
    assert {path.name for path in guarded.bundle.iterdir()} == names


def test_a_new_bundle_is_served_without_losing_a_request(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle", version="1")
    settings = {"bundle_poll_s": "0.1", "workers": "2", "threads": "1"}
    log = tmp_path / "log.txt"
    with running_service(bundle, log, **settings) as url:
        wait_for_workers(log, 2)
        with calling(url, log) as callers:
            callers.wait_for_version("1")
            for version, tile_size_px in (("2", 64), ("3", 128)):
                replace_bundle(bundle, version, tile_size_px=tile_size_px)
                callers.wait_for_version(version)
            replace_bundle(bundle, "4", is_broken=True)
            callers.wait_for(lambda: "is refused" in log.read_text())
            callers.wait_for_version("3")
    assert set(callers.seen) == {"1", "2", "3"}


def test_a_request_at_work_is_finished_and_traced_when_the_service_is_told_to_stop(
    tmp_path: Path, toy_bundle: Path
) -> None:
    log = tmp_path / "log.txt"
    settings = {"max_waiting_tiles": "9999", "threads": "1", "concurrency": "1"}
    large = encoded(blobs(1200, 1200))
    with contextlib.ExitStack() as stack:
        collector = stack.enter_context(running_collector())
        settings["otlp_endpoint"] = collector.url
        url, process = stack.enter_context(service_process(toy_bundle, log, **settings))
        wait_until_ready(url)
        with ThreadPoolExecutor(2) as pool:
            files = {"image": ("large.png", large)}
            traces = [f"{n:032x}" for n in (1, 2)]
            asked = [
                pool.submit(
                    httpx.post,
                    f"{url}/labels",
                    files=files,
                    headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-01"},
                    timeout=120,
                )
                for trace in traces
            ]
            name = "focalpath_requests_in_progress"
            _wait_for(lambda: _value(httpx.get(f"{url}/metrics").text, name) == 3, asked)
            process.terminate()
            assert [one.result().status_code for one in asked] == [200, 200]
        assert process.wait(timeout=_TIMEOUT_S) == 0
        for trace in traces:
            collector.wait_for("focalpath", "POST /labels", trace_id=trace)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/livez")


def _wait_for(condition: Callable[[], object], working: Sequence[Future[Any]] = ()) -> None:
    """Wait until the condition holds; what fails meanwhile fails here."""
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition():
        for one in working:
            if one.done():
                one.result()
        assert time.monotonic() < deadline
        time.sleep(0.02)
