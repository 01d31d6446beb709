"""`make load`: tests the service under load, bad input and faults, in bounded time.

It starts the service on 127.0.0.1 with the toy bundle, whose correct labels are known. The toy
model is so fast that the service is the limit. For your own service and model, use
`python -m serve load`.
"""

import asyncio
import json
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import tyro

from benchmarks.faults import FaultRun, run_with_fault, triton_killed, workers_killed, workers_of
from benchmarks.load_report import as_markdown, draw
from export.triton import publish
from serve.client.benchmark import describe_machine
from serve.client.load import LoadReport, Probe, measure_load, print_load, summarise_answers
from tests.support.http_service import service_process, wait_until_ready
from tests.support.malformed import (
    LIMITS,
    answers_rightly,
    is_refused,
    malformed_uploads,
    post,
    readable_uploads,
)
from tests.support.probes import probe_of
from tests.support.raw_http import INVALID_HTTP, address_of, exchange
from tests.support.toy_bundle import write_toy_bundle
from tests.support.triton_server import TritonServer

NUM_CLIENTS = 64
NUM_CLIENTS_IN_FAULTS = 16
MAX_WAITING = 16
"""Number of requests that may wait in the overloaded service."""
TIME_LIMIT_S = 5.0
"""Longest time for a refusal."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Test a service under load, bad input and faults, and write the results."""

    out: Path = Path("artifacts/results/serve")
    """Folder for load.json, load.md and load.png."""
    seconds: float = 60.0
    """Length of the steady load. The other loads take a third or half of it."""


def probes(count: int) -> list[Probe]:
    """One image per client, each of one class and of a different size."""
    return [probe_of(1 + index % 5, 40 + 4 * index) for index in range(count)]


@contextmanager
def started(folder: Path, **settings: str) -> Iterator[tuple[str, psutil.Process]]:
    """Start a service with the toy bundle and wait until all its workers are ready."""
    bundle = write_toy_bundle(folder / "bundle")
    log = folder / "log.txt"
    with service_process(bundle, log, python=None, threads="1", **settings) as (url, process):
        while log.read_text().count("1.0.0 answers") < int(settings.get("workers", "1")):
            time.sleep(0.1)
        wait_until_ready(url)
        yield url, psutil.Process(process.pid)


def steady(folder: Path, seconds: float) -> dict[str, Any]:
    """Load the service with as many clients as it accepts at once."""
    settings = {"workers": "2", "max_waiting": str(NUM_CLIENTS)}
    with started(folder, **settings) as (url, process):
        report = asyncio.run(measure_load(url, probes(NUM_CLIENTS), seconds, pid=process.pid))
    print_load(report)
    return {"settings": settings, **report.model_dump()}


def overload(folder: Path, seconds: float) -> dict[str, Any]:
    """Load the service with four times as many clients as may wait."""
    settings = {"workers": "1", "max_waiting": str(MAX_WAITING)}

    async def run(url: str, pid: int) -> tuple[LoadReport, int]:
        load = asyncio.ensure_future(measure_load(url, probes(NUM_CLIENTS), seconds, pid=pid))
        most = 0
        async with httpx.AsyncClient(timeout=30) as client:
            while not load.done():
                metrics = (await client.get(f"{url}/metrics")).text
                found = re.search(r"^focalpath_requests_in_progress (\S+)$", metrics, re.MULTILINE)
                if found:  # the request for the metrics is one of them
                    most = max(most, int(float(found[1])) - 1)
                await asyncio.sleep(0.1)
        return await load, most

    with started(folder, **settings) as (url, process):
        report, most = asyncio.run(run(url, process.pid))
    print_load(report)
    return {"settings": settings, "most_in_progress": most, **report.model_dump()}


def malformed(folder: Path) -> dict[str, Any]:
    """Send every malformed upload in turn, with good requests in between."""
    kinds: defaultdict[str, list[float]] = defaultdict(list)
    statuses: defaultdict[str, Counter[str]] = defaultdict(Counter)
    not_refused = num_good = 0
    with started(folder, **LIMITS) as (url, process), httpx.Client(timeout=60) as client:
        workers = [worker.pid for worker in workers_of(process.pid)]
        for index, upload in enumerate(malformed_uploads()):
            start = time.perf_counter()
            response = post(client, url, upload)
            kinds[upload.kind].append(time.perf_counter() - start)
            statuses[upload.kind][str(response.status_code)] += 1
            not_refused += not is_refused(response)
            if index % 10 == 0:
                num_good += 1
                assert answers_rightly(client, url), f"wrong answer after {upload.kind}"
        for kind, sent in INVALID_HTTP.items():
            start = time.perf_counter()
            status, _, body = exchange(address_of(url), sent)
            kinds["invalid HTTP"].append(time.perf_counter() - start)
            statuses["invalid HTTP"][str(status)] += 1
            not_refused += not (400 <= status < 500 and {"error", "code"} == set(json.loads(body)))
            assert answers_rightly(client, url), f"wrong answer after {kind}"
        readable = Counter(str(post(client, url, one).status_code) for one in readable_uploads())
        is_same = workers == [worker.pid for worker in workers_of(process.pid)]
    times = sorted(seconds for one in kinds.values() for seconds in one)
    print(f"{len(times)} malformed uploads, {not_refused} of them not refused with a 4xx in JSON")
    return {
        "settings": LIMITS,
        "count": len(times),
        "not_refused": not_refused,
        "right_answers_between": num_good,
        "same_worker_at_the_end": is_same,
        "median_ms": round(1000 * times[len(times) // 2], 1),
        "slowest_ms": round(1000 * times[-1], 1),
        "kinds": {
            kind: {"statuses": dict(statuses[kind]), "slowest_ms": round(1000 * max(found), 1)}
            for kind, found in sorted(kinds.items())
        },
        "damaged_but_readable": dict(readable),
    }


def triton_fault(folder: Path, seconds: float) -> dict[str, Any]:
    """Kill and restart Triton under load."""
    repository = folder / "repository"
    publish(write_toy_bundle(folder / "bundle"), repository)
    with TritonServer(repository) as triton:
        settings = {"workers": "2", "backend": "triton", "triton_url": triton.grpc_url}
        with started(folder, **settings) as (url, process):
            workers = {worker.pid for worker in workers_of(process.pid)}
            fault = triton_killed(triton, after_s=seconds / 4, down_s=seconds / 4)
            run = asyncio.run(
                run_with_fault(url, probes(NUM_CLIENTS_IN_FAULTS), fault, seconds=seconds)
            )
            is_same = workers == {worker.pid for worker in workers_of(process.pid)}
    return {
        **described(run),
        "outcomes_while_down": sorted(
            run.outcomes_between(run.events["killed"], run.events["starting"])
        ),
        "first_503_after_s": round(run.first_after("killing", "503"), 2),
        "right_again_after_s": round(run.first_after("started", "200"), 2),
        "service_not_started_again": is_same,
    }


def worker_fault(folder: Path, seconds: float, num_workers: int) -> dict[str, Any]:
    """Kill one worker of the service under load."""
    with started(folder, workers=str(num_workers)) as (url, process):
        fault = workers_killed(process.pid, pauses_s=[seconds / 5])
        run = asyncio.run(
            run_with_fault(url, probes(NUM_CLIENTS_IN_FAULTS), fault, seconds=seconds)
        )
    return {
        "num_workers": num_workers,
        **described(run),
        "right_again_after_s": round(run.first_after("killed", "200"), 2),
        "worker_replaced_after_s": round(run.events["started"] - run.events["killed"], 1),
    }


def described(run: FaultRun) -> dict[str, Any]:
    """Summarise a run with a fault."""
    seconds = run.answers[-1].at_s
    report = summarise_answers(run.answers, num_clients=NUM_CLIENTS_IN_FAULTS, seconds=seconds)
    changes: list[tuple[float, str]] = []
    for at_s, code in run.readiness:
        if not changes or changes[-1][1] != code:
            changes.append((round(at_s, 1), code))
    per_second: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for answer in run.answers:
        per_second[int(answer.at_s)][answer.outcome] += 1
    print(f"fault: {report.outcomes}, /readyz {changes}")
    return {
        **report.model_dump(exclude={"memory"}),
        "events_s": {name: round(at_s, 2) for name, at_s in run.events.items()},
        "readyz": changes,
        "outcomes_per_second": [dict(per_second[second]) for second in range(int(seconds))],
    }


def holds(results: dict[str, Any]) -> list[str]:
    """Name the checks that fail."""
    triton, over = results["triton_killed"], results["overload"]
    allowed = {"200", "ReadError", "RemoteProtocolError"}
    checks = {
        "steady load fails, or its memory grows": LoadReport.model_validate(results["steady"]).holds
        and set(results["steady"]["outcomes"]) == {"200"},
        "overload is not answered with 429": set(over["outcomes"]) == {"200", "429"},
        "more requests wait than allowed": over["most_in_progress"] < 2 * MAX_WAITING,
        "a malformed upload is not refused": results["malformed"]["not_refused"] == 0,
        "a refusal is slow": results["malformed"]["slowest_ms"] < 1000 * TIME_LIMIT_S,
        "the service crashed": results["malformed"]["same_worker_at_the_end"],
        "the answer without Triton is not 503": set(triton["outcomes"]) == {"200", "503"}
        and triton["outcomes_while_down"] == ["503"],
        "a killed worker costs requests of others": all(
            set(one["outcomes"]) <= allowed for one in results["worker_killed"]
        ),
    }
    return [name for name, is_right in checks.items() if not is_right]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything, write the results and print failed checks."""
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.load")
    with tempfile.TemporaryDirectory(prefix="focalpath-load-") as scratch:
        folders = iter(range(100))

        def folder() -> Path:
            path = Path(scratch) / str(next(folders))
            path.mkdir()
            return path

        results: dict[str, Any] = {
            "machine": describe_machine(0.0).model_dump(),
            "steady": steady(folder(), options.seconds),
            "overload": overload(folder(), options.seconds / 3),
            "malformed": malformed(folder()),
            "triton_killed": triton_fault(folder(), options.seconds / 2),
            "worker_killed": [worker_fault(folder(), options.seconds / 2, n) for n in (2, 1)],
        }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "load.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.out / "load.md").write_text(as_markdown(results), encoding="utf-8")
    draw(results, options.out / "load.png")
    for name in (wrong := holds(results)):
        print(f"failed check: {name}", file=sys.stderr)
    print(f"wrote {options.out}/load.json, load.md and load.png")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
