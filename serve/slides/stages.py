"""Where the time of a slide's blocks goes, stage by stage."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

STAGES = ("read", "model", "blend", "write")


class Stages:
    """Seconds of the thread that blends: it waits for `read`, `model` and `write`, or blends.

    The largest bounds the run.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Seconds per stage since the last call."""
        seconds, self._seconds = self._seconds, dict.fromkeys(STAGES, 0.0)
        return {stage: round(value, 3) for stage, value in seconds.items()}
