import asyncio
import json
import signal
from pathlib import Path

import numpy as np
import pytest

from serve.cli import main
from serve.client import load
from serve.client.load import (
    Answer,
    Load,
    Probe,
    ask_for,
    make_probes,
    measure_load,
    summarise_answers,
)
from serve.client.memory_watch import Memory, growth_of
from tests.support.http_service import service_process, wait_until_ready
from tests.support.ports import free_port
from tests.support.probes import probe_of

CLIENTS = 8
SECONDS = 1.0


def outcomes(url: str, probes: list[Probe], seconds: float = SECONDS) -> dict[str, int]:
    answers = asyncio.run(ask_for(url, probes, seconds))
    return summarise_answers(answers, num_clients=len(probes), seconds=seconds).outcomes


@pytest.mark.slow
def test_clients_at_the_same_time_get_the_labels_of_their_own_images(service_url: str) -> None:
    probes = [probe_of(1 + index % 5, 40 + 8 * index) for index in range(CLIENTS)]
    found = outcomes(service_url, probes)
    assert set(found) == {"200"}
    assert found["200"] >= CLIENTS


@pytest.mark.slow
def test_the_labels_of_another_image_are_wrong(service_url: str) -> None:
    mixed_up = Probe(probe_of(1).image, probe_of(2).labels)
    other_size = Probe(probe_of(1).image, probe_of(1, 32).labels)
    assert set(outcomes(service_url, [mixed_up, other_size], 0.2)) == {"wrong"}


def test_a_service_that_is_not_there_is_counted_by_what_fails() -> None:
    assert set(outcomes(f"http://127.0.0.1:{free_port()}", [probe_of(1)], 0.2)) == {"ConnectError"}


@pytest.mark.slow
def test_beyond_the_limit_clients_are_told_to_wait_and_nobody_fails(
    toy_bundle: Path, tmp_path: Path
) -> None:
    settings = {"max_waiting": "2", "threads": "1"}
    with service_process(toy_bundle, tmp_path / "log.txt", **settings) as (url, process):
        wait_until_ready(url)
        probes = [probe_of(1 + index % 5, 512) for index in range(CLIENTS)]
        report = asyncio.run(measure_load(url, probes, 2 * SECONDS, pid=process.pid))
    assert set(report.outcomes) == {"200", "429"}
    assert report.memory is not None
    assert min(report.memory.mebibytes) > 1


def test_the_clients_images_differ_in_size_and_labels(service_url: str) -> None:
    probes = make_probes(Load(url=service_url, clients=3))
    assert len({probe.labels.shape for probe in probes}) == 3
    assert all(len(np.unique(probe.labels)) > 1 for probe in probes)


@pytest.mark.slow
def test_the_command_writes_what_came_of_it(service_url: str, tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    options = ["--url", service_url, "--clients", "3", "--seconds", "0.5", "--out", str(out)]
    assert main(["load", *options]) == 0
    report = json.loads(out.read_text())
    assert set(report["outcomes"]) == {"200"}
    assert report["latency_p99_ms"] >= report["latency_p50_ms"] > 0


def test_the_command_says_that_there_is_no_service(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert main(["load", "--url", url, "--out", str(tmp_path / "load.json")]) == 1
    assert url in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--clients", "0"], ["--clients", "9999"], ["--seconds", "0"]])
def test_a_load_without_bounds_is_refused(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["load", *options]) == 1
    assert "expected 1 to 1024" in capsys.readouterr().err


def test_ctrl_c_cancels_what_is_under_way_and_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cancelled = []

    async def interrupted(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    monkeypatch.setattr(load, "make_probes", lambda _: [])
    monkeypatch.setattr(load, "measure_load", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert main(["load"]) == 130
    assert cancelled == [True]
    assert capsys.readouterr().err == "stopped\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_growth_is_that_of_the_line_and_not_of_its_ends() -> None:
    at_s = list(range(101))
    assert growth_of(at_s, [100.0] * 100 + [110.0]) < 0.01
    assert growth_of(at_s, [100.0 + index / 10 for index in at_s]) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("outcome", "growth", "holds"),
    [
        ("429", 0.0, True),
        ("200", 0.04, True),
        ("200", 0.06, False),
        *((outcome, 0.0, False) for outcome in ("wrong", "500", "503", "504", "400", "ReadError")),
    ],
)
def test_a_service_that_fails_a_request_or_grows_does_not_hold(
    outcome: str, growth: float, holds: bool
) -> None:
    answers = [Answer(1.0, 0.1, "200"), Answer(1.0, 0.1, outcome)]
    report = summarise_answers(answers, num_clients=1, seconds=1)
    memory = Memory(at_s=[0], mebibytes=[1], growth_in_second_half=growth)
    assert report.model_copy(update={"memory": memory}).holds == holds


def test_latencies_are_those_of_right_answers() -> None:
    answers = [Answer(0.1, 0.1, "200"), Answer(0.2, 0.3, "200"), Answer(9.0, 9.0, "429")]
    report = summarise_answers(answers, num_clients=3, seconds=1)
    assert (report.latency_p50_ms, report.latency_max_ms) == (200.0, 300.0)
    assert report.answers_per_second == 2
