"""The model's answers for a slide's tiles, in the order in which they are blended."""

import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import BackendUnavailableError
from serve.inference.batching import TileAnswer, TileRunner
from serve.slides.plan import Plan
from serve.slides.reuse import Use

T = TypeVar("T")
OUTPUT = "low_res_probabilities"
_LEAST_PENDING = 2
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


class Tile(NamedTuple):
    """A tile whose answer is wanted."""

    use: Use
    pixels: NDArray[np.uint8] | None
    """(T, T, 3) uint8; None where the answer is kept from an earlier block."""


class Answer(NamedTuple):
    """A tile's answer."""

    use: Use
    probabilities: NDArray[np.uint8]
    """(C, T/4, T/4) uint8."""


class TileAnswers:
    """Asks the model, and keeps the answers that a later block needs.

    Args:
        plan: of the slide.
        runner: the model.
        stages: what waiting for tiles and for the model is counted in.
        most_pending: tiles that are asked for at the same time, at most.
        soon_s: no more tiles are asked for than the model answers within these seconds.
    """

    def __init__(
        self, plan: Plan, runner: TileRunner, stages: Stages, *, most_pending: int, soon_s: float
    ) -> None:
        self._plan = plan
        self._runner = runner
        self._stages = stages
        self._most_pending = most_pending
        self._soon_s = soon_s
        self._kept: dict[tuple[int, int], NDArray[np.uint8]] = {}
        self._num_answers, self._seconds = 0, 0.0
        self._last = 0.0

    def in_order(self, items: Iterator[Tile | T]) -> Generator[Answer | T]:
        """Answer tiles; hand other items on in their place. Asks for some tiles ahead.

        Raises:
            BackendUnavailableError: the model failed; the message names the tile's place.
        """
        pending: deque[tuple[Use | T, Future[TileAnswer] | None]] = deque()
        asked = 0
        self._last = time.monotonic()
        try:
            while (item := self._next(items)) is not None:
                if isinstance(item, Tile):
                    pending.append((item.use, self._ask(item)))
                else:
                    pending.append((item, None))
                asked += pending[-1][1] is not None
                while asked > self.most_pending():
                    asked -= pending[0][1] is not None
                    yield self._answered(*pending.popleft())
            while pending:
                yield self._answered(*pending.popleft())
        finally:
            for _, answer in pending:
                if answer is not None:
                    answer.cancel()

    def most_pending(self) -> int:
        """Tiles to ask for at the same time: enough for full batches, and soon answered."""
        if self._num_answers == 0:
            return _LEAST_PENDING
        pace_s = max(self._seconds / self._num_answers, 1e-6)
        return max(min(self._most_pending, int(self._soon_s / pace_s)), _LEAST_PENDING)

    def _next(self, items: Iterator[T]) -> T | None:
        with self._stages.timed("read"):
            return next(items, None)

    def _ask(self, tile: Tile) -> Future[TileAnswer] | None:
        return None if tile.pixels is None else self._runner.submit(tile.pixels, (OUTPUT,))

    def _answered(self, item: Use | T, answer: Future[TileAnswer] | None) -> Answer | T:
        if not isinstance(item, Use):
            return item
        place = item.y, item.x
        if answer is None:
            return Answer(item, self._kept[place] if item.keep else self._kept.pop(place))
        found = self._wait(item, answer)
        if item.keep:
            self._kept[place] = found.copy()  # a view would keep its whole batch
        return Answer(item, found)

    def _wait(self, use: Use, answer: Future[TileAnswer]) -> NDArray[np.uint8]:
        try:
            with self._stages.timed("model"):
                found: NDArray[np.uint8] = answer.result()[OUTPUT]
        except BackendUnavailableError as error:
            origin, step = self._plan.origin_px, self._plan.step_px
            x, y = origin[1] + use.x * step[1], origin[0] + use.y * step[0]
            raise type(error)(
                f"{Path(self._plan.slide.path).name}: the tile at x {x:.0f}, y {y:.0f} of level 0 "
                f"failed: {error}"
            ) from error
        now = time.monotonic()
        self._num_answers, self._seconds = self._num_answers + 1, self._seconds + now - self._last
        self._last = now
        return found
