"""Processes, a few at a time: one that fails is left out, and the others go on."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Protocol

Row = tuple[str, int]
"""A name and a seed."""


class Worker(Protocol):
    """A process that was started."""

    @property
    def exitcode(self) -> int | None:
        """None while it runs, and 0 where it ended well."""

    def kill(self) -> None:
        """End it."""


class Jobs:
    """Processes, a few at a time, in the order in which they were added.

    Args:
        limit: how many run at a time.
        start: starts the process of a row.
    """

    def __init__(self, limit: int, start: Callable[..., Worker]) -> None:
        self._limit, self._start = limit, start
        self._waiting: list[tuple[Row, tuple[object, ...]]] = []
        self._running: dict[Row, tuple[Worker, float]] = {}
        self.seconds: dict[Row, float] = {}
        """How long the rows took that ended well."""

    @property
    def are_done(self) -> bool:
        """Whether nothing runs or waits."""
        return not self._waiting and not self._running

    def add(self, row: Row, *given: object) -> None:
        """Put a row at the end of the queue."""
        self._waiting.append((row, given))

    def step(self) -> list[Row]:
        """Start what there is room for, and return the rows that have ended well since."""
        done = []
        for row, (worker, started) in list(self._running.items()):
            if worker.exitcode is None:
                continue
            del self._running[row]
            if worker.exitcode == 0:
                self.seconds[row] = round(time.monotonic() - started, 1)
                done.append(row)
            else:
                print(f"{row[0]}, seed {row[1]}: exit {worker.exitcode}", flush=True)
        while self._waiting and len(self._running) < self._limit:
            row, given = self._waiting.pop(0)
            self._running[row] = (self._start(row, *given), time.monotonic())
        return done

    def give_up(self) -> None:
        """Drop what waits, and end what runs; its state is kept to resume from."""
        self._waiting.clear()
        for worker, _ in self._running.values():
            worker.kill()


def starter(method: str, run: Callable[..., None]) -> Callable[..., Worker]:
    """Start processes that call `run` with what a row was added with.

    Args:
        method: spawn, or fork to hand on what is in memory.
        run: the function.
    """
    context = multiprocessing.get_context(method)

    def start(*given: object) -> Worker:
        process: BaseProcess = context.Process(target=run, args=given)  # type: ignore[attr-defined]
        process.start()
        return process

    return start
