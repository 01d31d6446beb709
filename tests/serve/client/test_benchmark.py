import http.server
import itertools
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.cli import main
from serve.client.benchmark import (
    MODEL,
    SEGMENTER,
    SERVICE,
    BenchmarkReport,
    Measurement,
    describe_machine,
    goals_of,
    measure,
)
from serve.client.benchmark_report import markdown
from serve.client.benchmark_routes import Route, service_route, tissue_image
from serve.client.benchmark_run import Benchmark
from serve.images.tiles import cut_tiles
from tests.support.ports import free_port


def _measured(route: str, clients: int, p50_ms: float, per_second: float) -> Measurement:
    return Measurement(
        route=route,
        unit="image",
        clients=clients,
        num_requests=6,
        p50_ms=p50_ms,
        p95_ms=p50_ms,
        p99_ms=p50_ms,
        per_second=per_second,
    )


def test_the_benchmark_measures_this_process_and_a_service_and_says_what_it_left_out(
    toy_bundle: Path, service_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--url", service_url, "--clients", "1", "2", "--rounds", "2"]
    arguments += ["--min-requests", "2", "--image-size-px", "100", "--out", str(tmp_path)]
    arguments += ["--triton-http-url", f"127.0.0.1:{free_port()}"]
    assert main(["benchmark", "--bundle", str(toy_bundle), *arguments]) == 0
    report = BenchmarkReport.model_validate_json((tmp_path / "benchmark.json").read_bytes())
    assert [(one.route, one.clients, one.num_requests) for one in report.measurements] == [
        (route, clients, 2 * max(2, 2 * clients))
        for clients in (1, 2)
        for route in (MODEL, SEGMENTER, SERVICE)
    ]
    assert report.label_agreement == {SERVICE: 1.0}
    assert report.num_tiles == 4
    assert ["Triton was left out" in note for note in report.notes] == [True, False]
    assert report.backend.startswith("ONNX Runtime (CPUExecutionProvider) in fp32 (")
    assert re.search(r"\| +- +\| +- +\|", (tmp_path / "benchmark.md").read_text())
    assert "Triton was left out" in (tmp_path / "benchmark.md").read_text()
    assert "## Goals" in capsys.readouterr().out


def test_a_service_that_refuses_ends_the_benchmark_with_one_message(
    toy_bundle: Path, service_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--url", service_url, "--endpoint", "/nothing", "--image-size-px", "64"]
    bundle = ["--bundle", str(toy_bundle), "--out", str(tmp_path)]
    assert main(["benchmark", *bundle, *arguments]) == 1
    assert "/nothing answered 404" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--clients", "--rounds", "--image-size-px"])
def test_a_number_that_makes_no_sense_is_one_message(
    flag: str, toy_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", "--bundle", str(toy_bundle), flag, "0"]) == 1
    assert flag in capsys.readouterr().err


def _measure(ask: Callable[[], object] = lambda: None, **options: Any) -> Measurement:
    route = Route("r", lambda: nullcontext(ask))
    settings = {"levels": [1], "num_rounds": 1, "min_requests": 1, **options}
    (one,) = measure([route], "image", tell=lambda _: None, **settings)
    return one


def test_percentiles_are_of_all_rounds_and_the_throughput_is_the_median_of_the_rounds() -> None:
    # Two rounds of two requests: of 10 and 30 ms, then of 20 and 60 ms.
    ticks = iter(np.cumsum([0, 0, 0.01, 0, 0.03, 0, 0, 0.02, 0, 0.06]).tolist())
    one = _measure(num_rounds=2, min_requests=2, clock=lambda: next(ticks))
    assert (one.num_requests, one.p50_ms) == (4, pytest.approx(25))
    assert one.per_second == pytest.approx(np.median([2 / 0.04, 2 / 0.08]))


@pytest.mark.parametrize(
    ("num_requests", "expected"), [(19, (None, None)), (20, (20, None)), (100, (20, 20))]
)
def test_a_percentile_needs_enough_requests(
    num_requests: int, expected: tuple[float | None, float | None]
) -> None:
    ticks = itertools.count(step=0.02)
    one = _measure(min_requests=num_requests, clock=lambda: next(ticks))
    assert (one.p95_ms, one.p99_ms) == tuple(v and pytest.approx(v) for v in expected)


def test_by_default_the_median_and_p95_of_one_client_have_enough_requests() -> None:
    assert Benchmark.rounds * Benchmark.min_requests >= 20


def test_so_many_clients_ask_at_the_same_time() -> None:
    together, client = threading.Barrier(3), threading.local()

    def ask() -> None:
        if not hasattr(client, "was_here"):
            together.wait(timeout=60)
            client.was_here = True

    assert _measure(ask, levels=[3]).num_requests == 6


def test_answers_count_only_while_all_clients_are_asking() -> None:
    asked, is_first = itertools.count(1), iter((True, False))
    others_asked = threading.Event()

    def ask() -> None:
        if next(asked) == 9:
            others_asked.set()

    @contextmanager
    def connect() -> Iterator[Callable[[], None]]:
        if next(is_first):
            assert others_asked.wait(timeout=60)
        yield ask

    (one,) = measure(
        [Route("r", connect)], "image", levels=[2], num_rounds=1, min_requests=5,
        tell=lambda _: None,
    )  # fmt: skip
    assert one.num_requests == 5
    assert next(asked) > 9 + 5


def test_a_client_that_fails_ends_the_measurement() -> None:
    asked = itertools.count()

    def ask() -> None:
        if next(asked) == 40:
            raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        _measure(ask, levels=[3], min_requests=10**9)


def test_goals_are_met_or_missed_by_what_was_measured() -> None:
    def verdicts(service_ms: float, service_rate: float) -> list[bool]:
        rows = [_measured(name, 1, 300, 3) for name in (MODEL, SEGMENTER)]
        rows += [_measured(name, 8, 300, 4) for name in (MODEL, SEGMENTER)]
        rows += [_measured(SERVICE, 1, service_ms, 3), _measured(SERVICE, 8, 300, service_rate)]
        return [goal.is_met for goal in goals_of(rows)]

    assert verdicts(329, 3.7) == [True, True, True]
    assert verdicts(331, 3.5) == [False, False, False]
    assert goals_of([_measured(SERVICE, 1, 300, 3)]) == []
    fast = [_measured(MODEL, 1, 5, 3), _measured(SERVICE, 1, 14, 3)]  # to which 10 ms may be added
    assert [goal.is_met for goal in goals_of(fast)] == [True]


def test_the_report_shows_a_missed_goal_as_missed_and_tiles_apart() -> None:
    rows = [_measured(MODEL, 1, 100, 3), _measured(SERVICE, 1, 200, 3)]
    tile = _measured("Triton gRPC", 1, 5, 200).model_copy(update={"unit": "tile"})
    report = BenchmarkReport.model_validate(
        {
            "machine": describe_machine(0.0).model_dump(),
            "model": "segmenter 1",
            "backend": "ONNX Runtime",
            "image_px": (100, 50),
            "png_bytes": 1,
            "num_tiles": 1,
            "num_rounds": 1,
            "measurements": [one.model_dump() for one in (*rows, tile)],
            "label_agreement": {},
            "goals": [goal.model_dump() for goal in goals_of(rows)],
            "notes": ["a note"],
        }
    )
    text = re.sub(" +", " ", markdown(report))
    assert "| 10.00 | 100.00 | **missed** |" in text
    assert text.index("## Single tiles on Triton") < text.index("| Triton gRPC | 1 |")
    assert "- a note" in text


def test_the_drawn_image_compresses_as_tissue_does() -> None:
    from serve.client.benchmark_routes import png_of

    image = tissue_image(256)
    assert image.shape == (256, 256, 3)
    assert 0.4 < len(png_of(image)) / image.nbytes < 0.75


def test_the_tiles_that_are_cut_cover_the_image() -> None:
    image = np.arange(100 * 70 * 3, dtype=np.int64).astype(np.uint8).reshape(100, 70, 3)
    tiles = cut_tiles(image, 64)
    assert tiles.shape == (4, 64, 64, 3)
    assert np.array_equal(tiles[0], image[:64, :64])
    assert np.array_equal(tiles[-1][:, :-2], image[36:, 8:])


def test_a_connection_that_the_service_has_closed_is_made_again() -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")
            self.close_connection = True  # and the answer does not say so

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with service_route("r", url, "/", bytes(10**6), None).connect() as ask:
            assert [ask(), ask()] == [b"ok", b"ok"]
        server.shutdown()
