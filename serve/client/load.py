"""Loads a service with many clients at once, each with its own image, for a limited time.

Checks four things: no request fails, no client gets the answer of another, requests over the limit
are refused at once, and the memory of the service does not grow.
"""

import asyncio
import io
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel
from rich.console import Console

from serve.client.http import HttpClient, needs_environment
from serve.client.memory_watch import Memory, MemoryWatch
from serve.client.whole_files import write_together
from serve.contract.errors import BackendUnavailableError, SettingsError
from serve.contract.interrupts import ctrl_c_handler
from serve.contract.key_file import read_key

MAX_MEMORY_GROWTH = 0.05
"""Largest share by which the memory of the service may grow in the second half of the time."""
_MIN_AGREEMENT = 0.99
"""Share of labels that must be the same as without load: batches round differently."""
_PAUSE_S = 0.05
"""Pause between a failure and the next attempt."""
_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Load:
    """Load a running service with many clients at once; exit status 1 if it does not hold.

    Each client has an image of a different size. Its labels are requested once without load, and
    the answers under load must be the same. On HTTP 429 the client waits and asks again.
    """

    url: str = "http://127.0.0.1:3000"
    """Address of the service."""
    clients: int = 64
    """Number of clients; each sends its next request as soon as it has an answer."""
    seconds: float = 60.0
    """Duration of the load."""
    images: tuple[Path, ...] = ()
    """Images to resize for the clients; by default smooth colours are generated."""
    pid: int | None = None
    """Process id of the service on this machine, to watch its memory."""
    api_key_file: Path | None = None
    """File with the API key of the service, on its first line."""
    out: Path = Path("artifacts/load.json")
    """File to write to."""


@dataclass(frozen=True)
class Probe:
    """The image of one client, and the correct answer."""

    image: bytes
    """A PNG."""
    labels: NDArray[np.uint8]
    """(H, W) uint8, 1..C."""


@dataclass(frozen=True)
class Answer:
    """The outcome of one request."""

    at_s: float
    """Seconds from the start of the load to the answer."""
    seconds: float
    """Duration of the request."""
    outcome: str
    """The HTTP status, `wrong` for wrong labels, or the name of the connection's error."""


class LoadReport(BaseModel):
    """The result of a load."""

    num_clients: int
    seconds: float
    outcomes: dict[str, int]
    """Number of requests by outcome; see `Answer.outcome`."""
    answers_per_second: float
    latency_p50_ms: float
    latency_p95_ms: float
    latency_p99_ms: float
    latency_max_ms: float
    memory: Memory | None = None

    @property
    def holds(self) -> bool:
        """Whether every request got a correct answer or a 429, and the memory did not grow."""
        is_flat = self.memory is None or self.memory.growth_in_second_half < MAX_MEMORY_GROWTH
        return is_flat and self.outcomes.get("200", 0) > 0 and set(self.outcomes) <= {"200", "429"}


async def ask_for(
    url: str,
    probes: Sequence[Probe],
    seconds: float = 0,
    *,
    until: Callable[[], bool] = lambda: True,
    api_key: str | None = None,
    start: float | None = None,
) -> list[Answer]:
    """Run one client per probe.

    Args:
        url: of the service.
        probes: what each client sends, again and again.
        seconds: how long, at least.
        until: whether that was long enough.
        api_key: of the service, if it asks for one.
        start: of the load, by `time.perf_counter`; now, if there is none.

    Returns:
        All answers in order of time.
    """
    headers = {} if api_key is None else {"X-API-Key": api_key}
    limits = httpx.Limits(max_connections=len(probes), max_keepalive_connections=len(probes))
    answers: list[Answer] = []
    async with httpx.AsyncClient(
        headers=headers, limits=limits, timeout=_TIMEOUT_S, trust_env=needs_environment(url)
    ) as client:
        start = time.perf_counter() if start is None else start

        async def ask(probe: Probe) -> None:
            while time.perf_counter() - start < seconds or not until():
                begun = time.perf_counter()
                outcome, pause_s = await _ask_once(client, url, probe)
                ended = time.perf_counter()
                answers.append(Answer(ended - start, ended - begun, outcome))
                await asyncio.sleep(pause_s)

        await asyncio.gather(*(ask(probe) for probe in probes))
    return answers


async def _ask_once(client: httpx.AsyncClient, url: str, probe: Probe) -> tuple[str, float]:
    """The outcome, and the seconds to wait before the next request."""
    try:
        response = await client.post(f"{url}/labels", files={"image": ("probe.png", probe.image)})
    except httpx.TransportError as error:
        return type(error).__name__, _PAUSE_S
    if response.status_code == 429:
        return "429", float(response.headers.get("Retry-After", _PAUSE_S))
    if response.status_code != 200:
        return str(response.status_code), _PAUSE_S
    return ("200" if _is_right(response.content, probe.labels) else "wrong"), 0.0


def _is_right(content: bytes, labels: NDArray[np.uint8]) -> bool:
    try:
        found = np.asarray(Image.open(io.BytesIO(content)))
    except OSError:  # it is no image
        return False
    return found.shape == labels.shape and float(np.mean(found == labels)) >= _MIN_AGREEMENT


async def measure_load(
    url: str,
    probes: Sequence[Probe],
    seconds: float,
    *,
    pid: int | None = None,
    api_key: str | None = None,
) -> LoadReport:
    """Run `ask_for`, and watch the memory of the process `pid` at the same time."""
    watch = None if pid is None else MemoryWatch(pid)
    watching = None if watch is None else asyncio.ensure_future(watch.run())
    answers = await ask_for(url, probes, seconds, api_key=api_key)
    if watching is not None and not watching.done():
        watching.cancel()
    report = summarise_answers(answers, num_clients=len(probes), seconds=seconds)
    return report if watch is None else report.model_copy(update={"memory": watch.report()})


def summarise_answers(answers: Sequence[Answer], *, num_clients: int, seconds: float) -> LoadReport:
    """Count the outcomes; the latencies are those of correct answers."""
    right_ms = [1000 * answer.seconds for answer in answers if answer.outcome == "200"] or [0.0]
    p50, p95, p99, largest = (
        round(float(q), 1) for q in np.percentile(right_ms, (50, 95, 99, 100))
    )
    outcomes = Counter(answer.outcome for answer in answers)
    return LoadReport(
        num_clients=num_clients,
        seconds=seconds,
        outcomes=dict(sorted(outcomes.items())),
        answers_per_second=round(outcomes["200"] / seconds, 1),
        latency_p50_ms=p50,
        latency_p95_ms=p95,
        latency_p99_ms=p99,
        latency_max_ms=largest,
    )


def smooth_image(height: int, width: int, seed: int) -> Image.Image:
    """Draw an RGB image with large smooth regions in many colours."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def make_probes(command: Load) -> list[Probe]:
    """Make images of different sizes, and request their labels one after the other.

    Raises:
        FocalPathError: the service does not answer, or an image cannot be read.
    """
    sources = [Image.open(path).convert("RGB") for path in command.images]
    with HttpClient(command.url, api_key=read_key(command.api_key_file)) as client:
        side = client.manifest.tile_size_px
        probes = []
        for index in range(command.clients):
            size = (side // 2 + index, side)
            image = smooth_image(*size, seed=index)
            if sources:
                image = sources[index % len(sources)].resize((size[1], size[0]))
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            probes.append(Probe(buffer.getvalue(), client.segment(np.asarray(image)).labels))
    return probes


def run_load(command: Load) -> int:
    """Load the service, print and write the report; returns 1 if the service does not hold."""
    if not (1 <= command.clients <= 1024 and 0 < command.seconds <= 86_400):
        raise SettingsError(
            f"--clients is {command.clients} and --seconds {command.seconds:g}; expected 1 to "
            "1024, and up to a day."
        )
    if command.pid is not None and not psutil.pid_exists(command.pid):
        raise BackendUnavailableError(f"--pid is {command.pid}, but there is no such process.")
    key = read_key(command.api_key_file)
    load = measure_load(
        command.url, make_probes(command), command.seconds, pid=command.pid, api_key=key
    )
    with ctrl_c_handler(signal.default_int_handler):  # else asyncio would not cancel its tasks
        report = asyncio.run(load)
    print_load(report)
    out = command.out
    write_together(out.parent, {out.name: report.model_dump_json(indent=2).encode()})
    print(f"wrote {out}")
    return 0 if report.holds else 1


def print_load(report: LoadReport) -> None:
    """Print the report in a few lines."""
    counts = ", ".join(f"{count} x {outcome}" for outcome, count in report.outcomes.items())
    lines = [
        f"{report.num_clients} clients, {report.seconds:g} s: {counts}",
        f"{report.answers_per_second:g} correct answers/s; p50 {report.latency_p50_ms:g} ms, "
        f"p95 {report.latency_p95_ms:g} ms, p99 {report.latency_p99_ms:g} ms",
    ]
    if report.memory is not None:
        lines.append(
            f"memory {report.memory.mebibytes[0]:g} to {report.memory.mebibytes[-1]:g} MiB, "
            f"{report.memory.growth_in_second_half:+.1%} in the second half"
        )
    lines.append("holds" if report.holds else "does not hold")
    Console().print("\n".join(lines), highlight=False)
