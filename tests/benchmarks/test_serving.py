from pathlib import Path

import pytest

from benchmarks import perf_analyzer
from benchmarks.perf_analyzer import read_table, run_perf_analyzer
from benchmarks.serving import ServingReport, as_markdown, main, plot
from serve.client.benchmark import MODEL, SEGMENTER, SERVICE, Measurement, describe_machine
from serve.contract.errors import BackendUnavailableError
from serve.contract.manifest import read_bundle
from tests.support.errors import raises

TABLE = """Concurrency,Inferences/Second,Client Send,p50 latency,p90 latency,p95 latency,p99 latency
1,65.8854,99,15006,15500,16007,17008
4,131.5,12,30012,31000,32013,33014
"""


def test_the_table_of_perf_analyzer_is_read_in_milliseconds() -> None:
    first, second = read_table(TABLE, "gRPC")
    assert (first.concurrency, first.p50_ms, first.p99_ms) == (1, 15.006, 17.008)
    assert second.inferences_per_second == 131.5


def test_perf_analyzer_is_asked_for_the_models_shape_and_its_failure_is_told(
    toy_bundle: Path, tmp_path: Path
) -> None:
    program = tmp_path / "perf_analyzer"
    program.write_text('#!/bin/sh\necho "$@" >&2; exit 3\n')
    program.chmod(0o755)
    manifest = read_bundle(toy_bundle)
    with raises(
        BackendUnavailableError, program, "--shape image:64,64,3", "--shared-memory system"
    ):
        run_perf_analyzer(
            program, manifest, transport="shared memory", url="127.0.0.1:1", levels=[1]
        )


def test_what_perf_analyzer_measured_is_a_table_of_its_own_and_the_plot_is_a_picture() -> None:
    routes = [
        Measurement(
            route=route,
            unit="image",
            clients=1,
            num_requests=6,
            p50_ms=10,
            p95_ms=None,
            p99_ms=None,
            per_second=5,
        )
        for route in (MODEL, SERVICE)
    ]
    report = ServingReport(
        machine=describe_machine(0.0),
        model="segmenter 1",
        backend="ONNX Runtime",
        image_px=(100, 50),
        png_bytes=1,
        num_tiles=1,
        num_rounds=1,
        measurements=tuple(routes),
        perf_analyzer=tuple(read_table(TABLE, "gRPC")),
        label_agreement={},
        goals=(),
        notes=(),
    )
    rows = [line.strip("|").split("|") for line in as_markdown(report).splitlines()]
    assert ["gRPC", "4", "30.0", "32.0", "33.0", "131.50"] in [
        [cell.strip() for cell in row] for row in rows
    ]
    assert plot(report).startswith(b"\x89PNG")


@pytest.mark.triton
@pytest.mark.slow
def test_triton_is_measured_by_each_transport_and_by_perf_analyzer(
    toy_bundle: Path, service_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perf_analyzer, "WINDOW_MS", 300)  # of nine: three for each transport
    arguments = ["--url", service_url, "--clients", "1", "--rounds", "1", "--min-requests", "2"]
    arguments += ["--image-size-px", "100", "--out", str(tmp_path)]
    assert main(["--bundle", str(toy_bundle), *arguments]) == 0
    report = ServingReport.model_validate_json((tmp_path / "benchmark.json").read_bytes())
    by_transport = ["Triton HTTP", "Triton gRPC", "Triton shared memory"]
    tiles = [one.route for one in report.measurements if one.unit == "tile"]
    images = [one.route for one in report.measurements if one.unit == "image"]
    assert tiles == by_transport
    assert images == [MODEL, SEGMENTER, SERVICE, *by_transport]
    assert [row.transport for row in report.perf_analyzer] == ["HTTP", "gRPC", "shared memory"]
    assert report.label_agreement == dict.fromkeys([SERVICE, *by_transport], 1.0)
    assert ["stand-in" in note for note in report.notes] == [False, True]
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert "by perf_analyzer" in (tmp_path / "benchmark.md").read_text()
