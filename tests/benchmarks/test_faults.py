"""Triton or a worker dies while clients ask: some are refused, nobody gets a wrong answer."""

import asyncio
from pathlib import Path

import httpx
import pytest

from benchmarks.faults import run_with_fault, triton_killed, workers_killed, workers_of
from export.triton import publish
from serve.client.load import Probe
from tests.support.http_service import service_process, wait_for_workers, wait_until_ready
from tests.support.probes import probe_of
from tests.support.triton_server import TritonServer

CLIENTS = 6


def probes() -> list[Probe]:
    return [probe_of(1 + index % 5, 40 + 8 * index) for index in range(CLIENTS)]


@pytest.mark.triton
@pytest.mark.slow
def test_while_triton_is_killed_and_started_again_clients_get_a_503_or_the_right_answer(
    toy_bundle: Path, tmp_path: Path
) -> None:
    publish(toy_bundle, tmp_path / "repository")
    log = tmp_path / "log.txt"

    async def is_refused() -> None:
        async with httpx.AsyncClient(base_url=url) as client:
            answer = await client.post("/labels", files={"image": probes()[0].image})
            assert answer.status_code == 503
            while (await client.get("/readyz")).status_code != 503:
                await asyncio.sleep(0.05)

    with TritonServer(tmp_path / "repository") as triton:
        settings = {"backend": "triton", "triton_url": triton.grpc_url}
        with service_process(toy_bundle, log, **settings) as (url, process):
            wait_until_ready(url)
            before = [worker.pid for worker in workers_of(process.pid)]
            fault = triton_killed(triton, after_s=0.5, down_s=0.5, meanwhile=is_refused)
            run = asyncio.run(run_with_fault(url, probes(), fault))
            wait_until_ready(url)
            after = [worker.pid for worker in workers_of(process.pid)]
    events = run.events
    assert {answer.outcome for answer in run.answers} == {"200", "503"}
    assert run.outcomes_between(events["killed"], events["starting"]) <= {"503"}
    assert run.answers[-1].outcome == "200"
    assert after == before, "the service recovers without being started again"


@pytest.mark.slow
def test_workers_that_are_killed_cost_their_own_requests_only_and_are_replaced(
    toy_bundle: Path, tmp_path: Path
) -> None:
    """One of two, and soon the other: then nobody is left, and requests wait."""
    settings = {"workers": "2", "threads": "1"}
    log = tmp_path / "log.txt"

    async def other_answers() -> None:
        for _ in range(5):
            async with httpx.AsyncClient(base_url=url) as client:
                assert (await client.get("/readyz")).status_code == 200
                answer = await client.post("/labels", files={"image": probes()[0].image})
                assert answer.status_code == 200

    with service_process(toy_bundle, log, **settings) as (url, process):
        wait_for_workers(log, 2)
        assert len(workers_of(process.pid)) == 2
        fault = workers_killed(process.pid, pauses_s=[0.5, 0.5], meanwhile=other_answers)
        run = asyncio.run(run_with_fault(url, probes(), fault))
        assert len(workers_of(process.pid)) == 2
        wait_until_ready(url)
        assert httpx.post(f"{url}/labels", files={"image": probes()[0].image}).is_success
    outcomes = [answer.outcome for answer in run.answers]
    broken = [outcome for outcome in outcomes if outcome.endswith("Error")]
    assert set(outcomes) - set(broken) == {"200"}
    assert len(broken) <= 2 * CLIENTS  # those whose connection a worker had
    alone, nobody = run.events["killed"] + 0.5, run.events["killing 2"]
    assert run.outcomes_between(alone, nobody) <= {"200"}
