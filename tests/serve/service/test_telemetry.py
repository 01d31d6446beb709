import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import values

from serve.contract.errors import SettingsError
from serve.contract.manifest import read_bundle
from serve.inference.segmenter import open_segmenter
from serve.inference.summary import Summary
from serve.service.logs import RequestRecord, request_context
from serve.service.telemetry import ObservedBackend, Telemetry, forget_dead_workers
from serve.service.tracing import check_tracing
from serve.settings import ServeSettings
from tests.support.errors import raises
from tests.support.meanwhile import before_call
from tests.support.pictures import blobs, painted
from tests.support.toy_bundle import TILE_SIZE_PX

NO_PROCESS = 2**22 + 1
"""A process id above the largest that Linux gives."""


def _value(telemetry: Telemetry, name: str) -> float:
    lines = [line.rpartition(" ") for line in telemetry.render().decode().splitlines()]
    return {name: float(value) for name, _, value in lines if not name.startswith("#")}[name]


def _summary(bundle: Path, image: np.ndarray) -> Summary:
    with open_segmenter(ServeSettings(bundle=bundle, threads=1)) as segmenter:
        return segmenter.segment(image).summary


def test_a_stage_is_timed_also_when_it_fails() -> None:
    telemetry, record = Telemetry(), RequestRecord("1")
    with request_context(record), pytest.raises(ValueError, match="no"), telemetry.stage("decode"):
        raise ValueError("no")
    assert _value(telemetry, 'focalpath_stage_seconds_count{stage="decode"}') == 1
    assert list(record.stage_ms) == ["decode"]


def test_a_stage_that_comes_twice_is_added_up_in_the_record() -> None:
    telemetry, record = Telemetry(), RequestRecord("1")
    with request_context(record):
        telemetry.observe_stage("encode", 0.25)
        telemetry.observe_stage("encode", 0.5)
    assert record.stage_ms == {"encode": 750}


def test_a_batchs_stage_belongs_to_no_request() -> None:
    telemetry = Telemetry()
    with telemetry.stage("infer"):
        pass
    assert _value(telemetry, 'focalpath_stage_seconds_count{stage="infer"}') == 1


def test_the_shares_of_an_image_are_counted(toy_bundle: Path) -> None:
    telemetry = Telemetry()
    labels = np.full((TILE_SIZE_PX, TILE_SIZE_PX), 2)
    labels[:, : TILE_SIZE_PX // 4] = 4
    summary = _summary(toy_bundle, painted(labels))
    telemetry.observe_summary(summary)
    assert _value(telemetry, 'focalpath_class_pixels_total{class="Stroma"}') == 48 * 64
    assert _value(telemetry, 'focalpath_class_pixels_total{class="Necrosis"}') == 16 * 64
    low = _value(telemetry, "focalpath_low_confidence_share_sum")
    assert low == summary.low_confidence_share


def test_a_backends_batches_are_counted(toy_bundle: Path) -> None:
    telemetry = Telemetry()
    settings = ServeSettings(bundle=toy_bundle, threads=1)
    with open_segmenter(
        settings, observe=lambda backend: ObservedBackend(backend, telemetry)
    ) as segmenter:
        before = _value(telemetry, "focalpath_batch_size_sum")
        segmenter.segment(blobs(100, 100))
    assert _value(telemetry, "focalpath_batch_size_sum") - before == 4


def test_the_model_that_answers_is_named(toy_bundle: Path) -> None:
    telemetry, manifest = Telemetry(), read_bundle(toy_bundle)
    telemetry.model_serves(manifest, "triton", None)
    telemetry.model_refused()
    info = 'focalpath_model_info{backend="triton",name="segmenter",version="1.0.0"}'
    assert _value(telemetry, info) == 1
    assert _value(telemetry, 'focalpath_model_changes_total{outcome="refused"}') == 1


def test_a_worker_that_ended_is_taken_out_of_the_gauges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    for pid in (os.getpid(), NO_PROCESS):
        (tmp_path / f"gauge_livesum_{pid}.db").touch()
        (tmp_path / f"counter_{pid}.db").touch()
    forget_dead_workers()
    assert {path.name for path in tmp_path.iterdir()} == {
        f"gauge_livesum_{os.getpid()}.db",
        f"counter_{os.getpid()}.db",
        f"counter_{NO_PROCESS}.db",
    }


def test_workers_that_start_at_once_forget_the_same_dead_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    gauge = tmp_path / f"gauge_livesum_{NO_PROCESS}.db"
    gauge.touch()
    before_call(monkeypatch, os, "remove", gauge.unlink)
    forget_dead_workers()
    assert list(tmp_path.iterdir()) == []


def test_the_metrics_do_not_wait_for_a_worker_that_is_just_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    (tmp_path / "counter_1.db").touch()  # as it is before it has its size
    gone = tmp_path / f"gauge_livesum_{NO_PROCESS}.db"
    gone.write_bytes(bytes(8))
    before_call(monkeypatch, Path, "stat", gone.unlink)
    assert Telemetry().render() == b""
    counted = values.MultiProcessValue(lambda: 2)  # type: ignore[no-untyped-call]
    counted("counter", "tiles", "tiles_total", (), (), "Tiles.").inc(3)
    assert b"tiles_total 3.0" in Telemetry().render()


def test_an_address_for_traces_without_the_exporter_is_one_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exporter = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, exporter, None)
    with raises(SettingsError, "'.[tracing]'"):
        check_tracing(ServeSettings(otlp_endpoint="http://127.0.0.1:1/v1/traces"))
    check_tracing(ServeSettings())


def test_onnx_runtime_sends_no_usage_data() -> None:
    for package in ("serve", "export"):
        script = f"import {package}, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
        environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
        finished = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True
        )
        assert finished.stdout == "1\n", finished.stderr
