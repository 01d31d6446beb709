"""Injects faults under load: kills Triton or a worker of the service."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import httpx
import psutil

from serve.client.load import Answer, Probe, ask_for
from tests.support.triton_server import TritonServer

_SAMPLE_EVERY_S = 0.25


async def _nothing() -> None:
    pass


@dataclass
class FaultRun:
    """Answers, samples of `/readyz` and times of events, in seconds after the start."""

    answers: list[Answer] = field(default_factory=list)
    readiness: list[tuple[float, str]] = field(default_factory=list)
    events: dict[str, float] = field(default_factory=dict)

    def outcomes_between(self, begin_s: float, end_s: float) -> set[str]:
        """Outcomes of the requests that began after `begin_s` and ended before `end_s`."""
        return {
            answer.outcome
            for answer in self.answers
            if begin_s <= answer.at_s - answer.seconds and answer.at_s < end_s
        }

    def first_after(self, event: str, outcome: str) -> float:
        """Seconds from an event to the end of the first request with this outcome."""
        at_s = self.events[event]
        return min(a.at_s - at_s for a in self.answers if a.at_s > at_s and a.outcome == outcome)


async def run_with_fault(
    url: str,
    probes: list[Probe],
    do: Callable[[Callable[[str], None]], Awaitable[None]],
    *,
    seconds: float = 0,
) -> FaultRun:
    """Send requests and sample `/readyz` while `do` injects a fault and reports its events.

    Lasts `seconds` at least, and until the service has been ready again for half a second.
    """
    start = time.perf_counter()
    run = FaultRun()

    async def sample() -> None:
        async with httpx.AsyncClient(timeout=10) as client:
            while True:
                try:
                    status = str((await client.get(f"{url}/readyz")).status_code)
                except httpx.TransportError as error:
                    status = type(error).__name__
                run.readiness.append((time.perf_counter() - start, status))
                await asyncio.sleep(_SAMPLE_EVERY_S)

    def happened(event: str) -> None:
        run.events[event] = time.perf_counter() - start

    async def inject_and_recover() -> None:
        await do(happened)
        num_samples = len(run.readiness)
        while "200" not in {status for _, status in run.readiness[num_samples:]}:
            await asyncio.sleep(_SAMPLE_EVERY_S)
        await asyncio.sleep(2 * _SAMPLE_EVERY_S)

    sampling = asyncio.ensure_future(sample())
    fault = asyncio.ensure_future(inject_and_recover())
    asking = ask_for(url, probes, seconds, until=fault.done, start=start)
    run.answers, _ = await asyncio.gather(asking, fault)
    sampling.cancel()
    return run


def triton_killed(
    triton: TritonServer,
    *,
    after_s: float,
    down_s: float,
    meanwhile: Callable[[], Awaitable[None]] = _nothing,
) -> Callable[[Callable[[str], None]], Awaitable[None]]:
    """Make a fault that kills Triton with SIGKILL, does `meanwhile`, and restarts it."""

    async def do(happened: Callable[[str], None]) -> None:
        await asyncio.sleep(after_s)
        happened("killing")
        await asyncio.to_thread(triton.kill)
        happened("killed")
        await asyncio.sleep(down_s)
        await meanwhile()
        happened("starting")
        await asyncio.to_thread(triton.start)
        happened("started")

    return do


def workers_killed(
    pid: int, *, pauses_s: Sequence[float], meanwhile: Callable[[], Awaitable[None]] = _nothing
) -> Callable[[Callable[[str], None]], Awaitable[None]]:
    """Make a fault that kills a worker with SIGKILL after each pause, and waits for new ones.

    It does `meanwhile` before each but the first.
    """

    async def do(happened: Callable[[str], None]) -> None:
        before = workers_of(pid)
        for number, (worker, pause_s) in enumerate(zip(before, pauses_s, strict=False), start=1):
            await asyncio.sleep(pause_s)
            if number > 1:
                await meanwhile()
            suffix = "" if number == 1 else f" {number}"
            happened(f"killing{suffix}")
            worker.kill()
            happened(f"killed{suffix}")
        old = {worker.pid for worker in before}
        while len({worker.pid for worker in workers_of(pid)} - old) < len(pauses_s):
            await asyncio.sleep(_SAMPLE_EVERY_S)
        happened("started")

    return do


def workers_of(pid: int) -> list[psutil.Process]:
    """The service's worker processes."""
    workers = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if any("worker.service" in word for word in process.cmdline()):
                workers.append(process)
        except psutil.NoSuchProcess:
            continue
    return workers
