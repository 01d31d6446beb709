"""Models whose answers are there already, so that all that is not the model can be measured."""

from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from serve.inference.batching import TileAnswer, TileRunner


class InstantModel(TileRunner):
    """Answers at once, by the tile's first pixel, with one of the maps that it was given.

    Args:
        maps: (N, C, T/4, T/4) uint8, given for every output.
    """

    def __init__(self, maps: NDArray[np.uint8]) -> None:
        self._maps = maps

    def submit(self, tile: NDArray[np.uint8], outputs: Sequence[str]) -> Future[TileAnswer]:
        """See `TileRunner.submit`."""
        future: Future[TileAnswer] = Future()
        chosen = self._maps[int(tile[0, 0].sum()) % len(self._maps)]
        future.set_result({name: chosen for name in outputs})
        return future

    def is_ready(self) -> bool:
        """See `TileRunner.is_ready`."""
        return True

    def close(self) -> None:
        """Nothing to free."""


class RecordedModel(InstantModel):
    """Passes tiles on to a model and keeps its answers; from then on it repeats them.

    Args:
        runner: the model; not closed with this.
    """

    def __init__(self, runner: TileRunner) -> None:
        self._runner = runner
        self._answers: list[Future[TileAnswer]] = []
        self._next: int | None = None
        """None while answers are recorded."""

    def rewind(self) -> None:
        """Repeat the answers from the first one on; the same tiles have to come again."""
        self._next = 0

    def submit(self, tile: NDArray[np.uint8], outputs: Sequence[str]) -> Future[TileAnswer]:
        """See `TileRunner.submit`."""
        if self._next is None:
            self._answers.append(self._runner.submit(tile, outputs))
            return self._answers[-1]
        self._next += 1
        return self._answers[self._next - 1]
