"""The model's answers for a slide's tiles, in the order in which they are blended."""

import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import BackendUnavailableError
from serve.inference.batching import TileAnswer, TileRunner
from serve.slides.plan import Plan
from serve.slides.reuse import Use
from serve.slides.stages import Stages

OUTPUT = "low_res_probabilities"
_LEAST_PENDING = 2


@dataclass(frozen=True)
class Asked:
    """A tile that the model works on, or whose answer is kept from an earlier block."""

    use: Use
    answer: Future[TileAnswer] | None
    """None where the answer is kept."""


class TileAnswers:
    """Asks the model, and keeps the answers that a later block needs.

    Args:
        plan: of the slide.
        runner: the model.
        stages: what waiting for the model is counted in.
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
        self._last = time.monotonic()

    def begin(self) -> None:
        """Start the clock of the model's pace."""
        self._last = time.monotonic()

    def ask(self, use: Use, pixels: NDArray[np.uint8] | None) -> Asked:
        """Ask for a (T, T, 3) tile's answer; no pixels where it is kept."""
        return Asked(use, None if pixels is None else self._runner.submit(pixels, (OUTPUT,)))

    def most_pending(self) -> int:
        """Tiles to ask for at the same time: enough for full batches, and soon answered."""
        if self._num_answers == 0:
            return _LEAST_PENDING
        pace_s = max(self._seconds / self._num_answers, 1e-6)
        return max(min(self._most_pending, int(self._soon_s / pace_s)), _LEAST_PENDING)

    def take(self, asked: Asked) -> NDArray[np.uint8]:
        """Wait for a tile's answer, (C, T/4, T/4) uint8.

        Raises:
            BackendUnavailableError: the model failed; the message names the tile's place.
        """
        use = asked.use
        place = use.y, use.x
        if asked.answer is None:
            return self._kept[place] if use.keep else self._kept.pop(place)
        found = self._wait(use, asked.answer)
        if use.keep:
            self._kept[place] = found.copy()  # a view would keep its whole batch
        return found

    def leave(self, pending: Iterable[object]) -> None:
        """Cancel what is asked for, and forget what is kept."""
        self._kept.clear()
        for item in pending:
            if isinstance(item, Asked) and item.answer is not None:
                item.answer.cancel()

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
