"""Measures latency and throughput of every route to a segmentation: `python -m serve benchmark`.

The routes take turns within each number of clients and each round, so that other load on the
machine affects all of them. Each client sends its next request as soon as it has an answer, and
answers count while all clients do so: in a short run the start and the end, when some clients have
nothing to do, would be a tenth of the time. The clients run on the machine that is measured and use
part of its processors.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
from pydantic import BaseModel

from serve.client.benchmark_routes import Route
from serve.contract.machine import installed_versions, this_machine

GOAL_CLIENTS = 8
MODEL = "model alone"
"""The backend in this process on all tiles of the image: nothing is cut, blended or decoded."""
SEGMENTER = "in process"
"""Pixels to labels in this process."""
SERVICE = "HTTP service"
MAX_ADDED_MS, MAX_ADDED_SHARE = 10.0, 0.10
MIN_THROUGHPUT_SHARE = 0.90
_PACKAGES = ("onnxruntime", "openvino", "bentoml", "tritonclient", "pillow", "numpy")

Unit = Literal["image", "tile"]


class Machine(BaseModel):
    """The machine that was measured."""

    processor: str
    num_cpus: int
    system: str
    python: str
    packages: dict[str, str]
    load_average: tuple[float, float]
    """Averages over one minute, before and after the run."""


class Measurement(BaseModel):
    """One route with a number of clients."""

    route: str
    unit: Unit
    """What one request asks for: a whole image, or one tile."""
    clients: int
    num_requests: int
    """In all rounds together."""
    p50_ms: float
    p95_ms: float | None
    """None for fewer than 20 requests: it would be the largest of them."""
    p99_ms: float | None
    """None for fewer than 100 requests."""
    per_second: float
    """Median over the rounds."""


class Goal(BaseModel):
    """A goal, and the value that was measured."""

    text: str
    limit: float
    found: float
    is_met: bool


class BenchmarkReport(BaseModel):
    """Everything that one run measured; the content of `benchmark.json`."""

    machine: Machine
    model: str
    backend: str
    image_px: tuple[int, int]
    png_bytes: int
    num_tiles: int
    num_rounds: int
    measurements: tuple[Measurement, ...]
    label_agreement: dict[str, float]
    """Per route, the share of pixels with the same label as in this process."""
    goals: tuple[Goal, ...]
    notes: tuple[str, ...]
    """What was left out, and what the numbers do not show."""


def describe_machine(load_before: float) -> Machine:
    """Describe the machine this runs on."""
    machine = this_machine()
    return Machine(
        processor=machine.processor.title,
        num_cpus=machine.num_cpus,
        system=machine.system,
        python=machine.python,
        packages=installed_versions(_PACKAGES),
        load_average=(load_before, os.getloadavg()[0]),
    )


def measure(
    routes: Sequence[Route],
    unit: Unit,
    *,
    levels: Sequence[int],
    num_rounds: int,
    min_requests: int,
    tell: Callable[[str], None],
    clock: Callable[[], float] = time.perf_counter,
) -> list[Measurement]:
    """Measure every route at every level; the routes take turns within each round.

    Args:
        routes: the routes to compare.
        unit: what one request of a route asks for.
        levels: numbers of clients.
        num_rounds: number of turns of each route.
        min_requests: requests per turn, or twice the number of clients if that is more.
        tell: called with the name of what is measured next.
        clock: returns seconds that only increase.
    """
    measurements = []
    for clients in levels:
        num_requests = max(min_requests, 2 * clients)
        times: dict[str, list[float]] = {route.name: [] for route in routes}
        rates: dict[str, list[float]] = {route.name: [] for route in routes}
        for round_ in range(num_rounds):
            for route in routes:
                tell(f"{clients} clients, round {round_ + 1}: {route.name}")
                seconds, taken = _one_turn(route, clients, num_requests, clock)
                times[route.name] += taken
                rates[route.name].append(num_requests / seconds)
        measurements += [
            _summary(route.name, unit, clients, times[route.name], rates[route.name])
            for route in routes
        ]
    return measurements


def _one_turn(
    route: Route, clients: int, num_requests: int, clock: Callable[[], float]
) -> tuple[float, list[float]]:
    """Seconds in which so many requests were answered, and the seconds of each."""
    window = _Window(clients, num_requests, clock)

    def work() -> None:
        try:
            with route.connect() as ask:
                ask()  # the first request of a connection pays for lazy initialisation
                window.enter()
                while not window.is_over:
                    start = clock()
                    ask()
                    window.add(start)
        finally:
            window.is_over = True

    with ThreadPoolExecutor(clients) as pool:
        for working in [pool.submit(work) for _ in range(clients)]:
            working.result()
    return window.seconds, window.taken


class _Window:
    """The time in which all clients are busy: neither the first is alone nor the last."""

    def __init__(self, clients: int, num_requests: int, clock: Callable[[], float]) -> None:
        self._missing, self._num_requests, self._clock = clients, num_requests, clock
        self._guard = threading.Lock()
        self._began = self.seconds = 0.0
        self.taken: list[float] = []
        self.is_over = False

    def enter(self) -> None:
        """Say that a client has its first answer. With the last client's the time begins."""
        with self._guard:
            self._missing -= 1
            if not self._missing:
                self._began = self._clock()

    def add(self, start: float) -> None:
        """Count an answer, if all clients are there. With the last of them the time ends."""
        with self._guard:
            if self._missing or self.is_over:
                return
            now = self._clock()
            self.taken.append(now - start)
            if len(self.taken) == self._num_requests:
                self.seconds = now - self._began
                self.is_over = True


def _summary(
    route: str, unit: Unit, clients: int, seconds: list[float], rates: list[float]
) -> Measurement:
    p50, p95, p99 = np.percentile(1000 * np.array(seconds), (50, 95, 99)).tolist()
    return Measurement(
        route=route,
        unit=unit,
        clients=clients,
        num_requests=len(seconds),
        p50_ms=p50,
        p95_ms=p95 if len(seconds) >= 20 else None,
        p99_ms=p99 if len(seconds) >= 100 else None,
        per_second=float(np.median(rates)),
    )


def goals_of(measurements: Sequence[Measurement]) -> list[Goal]:
    """Compare the service with its goals, as far as their routes were measured."""
    found = {(one.route, one.clients): one for one in measurements if one.unit == "image"}
    goals = []
    model, service = found.get((MODEL, 1)), found.get((SERVICE, 1))
    if model is not None and service is not None:
        limit = max(MAX_ADDED_MS, MAX_ADDED_SHARE * model.p50_ms)
        added = service.p50_ms - model.p50_ms
        goals.append(
            Goal(
                text=f"the service adds at most {MAX_ADDED_MS:g} ms or {MAX_ADDED_SHARE:.0%} to "
                "the model's own time, at the median, in ms",
                limit=limit,
                found=added,
                is_met=added <= limit,
            )
        )
    service = found.get((SERVICE, GOAL_CLIENTS))
    for name in (MODEL, SEGMENTER):
        other = found.get((name, GOAL_CLIENTS))
        if other is not None and service is not None:
            share = service.per_second / other.per_second
            goals.append(
                Goal(
                    text=f"share of the throughput of '{name}' that the service has with "
                    f"{GOAL_CLIENTS} clients, at least",
                    limit=MIN_THROUGHPUT_SHARE,
                    found=share,
                    is_met=share >= MIN_THROUGHPUT_SHARE,
                )
            )
    return goals
