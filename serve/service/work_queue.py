"""The images that wait for the model, weighed by the tiles that they cost.

An image of 100 tiles takes as long as 100 of one tile, so requests are not counted but weighed. The
queue is fair to small images in two ways (our choice):

- A quarter of the limit is kept for small images, so that large ones never fill the queue.
- Images are worked on in the order in which they came, but large ones take half of the threads at
  most, where there are several. So a small image waits for other small ones at most, and few large
  ones are in memory.

A refused caller is told when to come back, from the tiles per second that were measured.
"""

import asyncio
import contextvars
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from serve.contract.errors import BusyError

T = TypeVar("T")
KEPT_FOR_SMALL = 1 / 4
"""Share of the limit that large images may not fill."""
SMALL = 1 / 32
"""Share of the limit up to which an image is small."""
MOST_RETRY_AFTER_S = 600
_FADING = 0.9
"""Weight of the earlier measurements after each image."""


@dataclass(eq=False)
class _Item:
    """An image that is waiting or being segmented."""

    tiles: int
    is_small: bool
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.Future())


class TileRate:
    """Tiles per second while there is work: of the last images most.

    Args:
        now: seconds of a clock that never goes back.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._since: float | None = None
        self._tiles = self._seconds = 0.0

    @property
    def per_second(self) -> float | None:
        """None before the first image is done."""
        return self._tiles / self._seconds if self._seconds > 0 and self._tiles > 0 else None

    def begin(self) -> None:
        """Note that work begins after a pause."""
        self._since = self._now()

    def done(self, tiles: int) -> None:
        """Note that an image is done."""
        now = self._now()
        since = now if self._since is None else self._since
        self._since = now
        self._tiles = self._tiles * _FADING + tiles
        self._seconds = self._seconds * _FADING + max(now - since, 0.0)


class WorkQueue:
    """Runs work in threads: at most `concurrency` images at the same time, the others wait.

    All methods are called in one event loop.

    Args:
        concurrency: images at work at the same time.
        max_tiles: most tiles of the images at work and waiting. An image of more is taken where no
            other large one is there.
        rate: measures the speed.
        observe: is told the tiles at work and waiting, and the tiles per second, at each change.
    """

    def __init__(
        self,
        concurrency: int,
        max_tiles: int,
        *,
        rate: TileRate | None = None,
        observe: Callable[[int, float | None], None] = lambda tiles, per_second: None,
    ) -> None:
        self._observe = observe
        self._concurrency = concurrency
        self._max_tiles = max_tiles
        self._kept = int(max_tiles * KEPT_FOR_SMALL)
        self.rate = rate or TileRate()
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="segment")
        self._waiting: deque[_Item] = deque()
        self._at_work: set[_Item] = set()
        self._held = {True: 0, False: 0}

    @property
    def tiles(self) -> int:
        """Number of tiles of all images that are waiting or being segmented."""
        return sum(self._held.values())

    def refusal(self, tiles: int = 1) -> BusyError | None:
        """Why an image of this many tiles is refused now; None if it is accepted."""
        too_many = self._excess(tiles)
        if too_many <= 0:
            return None
        kept = "" if self._is_small(tiles) else f", {self._kept} of them kept for small images"
        return BusyError(
            f"Images of {self.tiles} tiles are at work or waiting, and this one has {tiles}; at "
            f"most {self._max_tiles} are accepted{kept}. Try again later.",
            retry_after_s=self.seconds_for(too_many),
        )

    def seconds_for(self, tiles: float) -> int:
        """Seconds that this many tiles take at the measured rate; 1 if nothing was measured yet."""
        per_second = self.rate.per_second
        if per_second is None:
            return 1
        return max(1, min(math.ceil(tiles / per_second), MOST_RETRY_AFTER_S))

    def seconds_for_one(self) -> int:
        """Seconds that an image of average size takes."""
        num_images = len(self._waiting) + len(self._at_work)
        return self.seconds_for(self.tiles / num_images) if num_images else 1

    async def run(self, work: Callable[[], T], *, tiles: int = 0, may_refuse: bool = True) -> T:
        """Do `work` in a thread when its turn comes, in the context of the caller.

        Args:
            work: what to do.
            tiles: what it costs.
            may_refuse: whether a full queue refuses it; else it waits all the same.

        Raises:
            BusyError: the queue is full.
        """
        refusal = self.refusal(tiles) if may_refuse and tiles else None
        if refusal is not None:
            raise refusal
        item = self._enter(tiles)
        try:
            await item.turn
        except asyncio.CancelledError:
            self._leave(item, is_done=False)
            raise
        context = contextvars.copy_context()
        running: Future[T] = self._pool.submit(context.run, work)
        loop = asyncio.get_running_loop()
        # When the thread ends, not when the caller leaves: until then the thread is busy.
        running.add_done_callback(lambda _: _call_in(loop, lambda: self._leave(item, is_done=True)))
        return await asyncio.wrap_future(running)

    def _is_small(self, tiles: int) -> bool:
        return tiles <= max(int(self._max_tiles * SMALL), 1)

    def _excess(self, tiles: int) -> int:
        """Tiles that must be done before an image of this many is accepted."""
        over_all = self.tiles + tiles - self._max_tiles
        if self._is_small(tiles):
            return min(over_all, self._held[True] + tiles - self._kept)
        large = self._held[False]
        if not large:
            return 0
        # An image larger than the whole limit waits until there is no other large one.
        over_large = large + tiles - (self._max_tiles - self._kept)
        return min(max(over_all, over_large), large)

    def _enter(self, tiles: int) -> _Item:
        if not (self._waiting or self._at_work):
            self.rate.begin()
        item = _Item(tiles, self._is_small(tiles))
        self._held[item.is_small] += tiles
        self._waiting.append(item)
        self._begin_next()
        self._observe(self.tiles, self.rate.per_second)
        return item

    def _leave(self, item: _Item, *, is_done: bool) -> None:
        if item in self._at_work:
            self._at_work.remove(item)
        else:
            self._waiting.remove(item)
        self._held[item.is_small] -= item.tiles
        if is_done and item.tiles:
            self.rate.done(item.tiles)
        self._begin_next()
        self._observe(self.tiles, self.rate.per_second)

    def _begin_next(self) -> None:
        while len(self._at_work) < self._concurrency:
            num_large = sum(not item.is_small for item in self._at_work)
            takes_large = num_large < max(self._concurrency // 2, 1)
            fitting = (item for item in self._waiting if item.is_small or takes_large)
            item = next(fitting, None)
            if item is None:
                return
            self._waiting.remove(item)
            self._at_work.add(item)
            if not item.turn.done():  # its caller may be cancelled at this moment
                item.turn.set_result(None)


def _call_in(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Call a function in an event loop from another thread, unless the loop has ended."""
    with suppress(RuntimeError):  # of a closed loop; it may be closed at this moment
        loop.call_soon_threadsafe(call)
