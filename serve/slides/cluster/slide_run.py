"""The blocks of slides on a cluster: which wait, which are at work, and which a worker takes next.

Without Ray, and without threads: `dispatch` calls it from one thread.

Ray's `ActorPool` hands the next task to any free actor, and an actor keeps its task when it dies.
Here a slide's blocks prefer one machine, whose cache then has the slide's file, and a block whose
worker died goes to whichever worker is free.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from serve.slides.block_record import BlockRecord
from serve.slides.errors import WorkerDiedError
from serve.slides.plan import Block
from serve.slides.store import WorkFolder
from serve.slides.worker import OnBlock, OnTiles

MOST_BLOCKS = 8
"""Most blocks of one call. Within a call, a worker reads ahead from block to block."""
MOST_TRIES = 3
"""Number of workers that a block may kill before its slide fails."""


@dataclass(eq=False)
class Call:
    """Blocks of one slide that a worker computes one after the other."""

    slide: "SlideRun"
    blocks: tuple[Block, ...]
    ticket: int
    tiles: int = 0
    """Number of tiles done, as the worker last reported."""


@dataclass(eq=False)
class SlideRun:
    """The blocks of one slide that are still to be computed."""

    work: WorkFolder
    waiting: deque[Block]
    on_block: OnBlock
    """What this or `on_tiles` raises stops the slide."""
    on_tiles: OnTiles
    home: str | None = None
    """The machine that its blocks prefer."""
    calls: list[Call] = field(default_factory=list)
    """Those that have not returned."""
    tries: Counter[Block] = field(default_factory=Counter)
    """How often a worker died while it computed a block, as far as known."""
    error: Exception | None = None
    """Why the slide fails; raised once all calls have returned."""
    future: Future[None] = field(default_factory=Future)
    """Done when no call is running any more."""
    _finished_tiles: int = 0
    _told_tiles: int = 0

    def begin(self, blocks: tuple[Block, ...], ticket: int) -> Call:
        """Note that a worker computes blocks, which `choose` took off the list."""
        call = Call(self, blocks, ticket)
        self.calls.append(call)
        return call

    def end(
        self, call: Call, records: Sequence[BlockRecord] = (), error: Exception | None = None
    ) -> None:
        """Note that a call has returned: what is done, and why the slide fails."""
        self._count(records)
        self.error = self.error or error
        self.calls.remove(call)
        self.tell_tiles()

    def give_back(self, call: Call) -> None:
        """Note that a worker has not begun its blocks: they wait again."""
        self._wait_again(call.blocks)
        self.end(call)

    def worker_died(self, call: Call, host: str) -> None:
        """Note that a worker died: the blocks that are not done wait again, `MOST_TRIES` times."""
        done = self.work.records()
        error = None
        left = [block for block in call.blocks if block not in done]
        if left and self.error is None:
            self.tries[left[0]] += 1
            if self.tries[left[0]] < MOST_TRIES:
                self._wait_again(left)
            else:
                error = WorkerDiedError(
                    f"{self.work.name}: the worker died {MOST_TRIES} times of block "
                    f"{left[0].name}, the last time on {host}. It ran out of memory, or a library "
                    "failed on this slide: see Ray's logs. Convert the slide again, or leave it "
                    "out."
                )
        self.end(call, [done[block] for block in call.blocks if block in done], error)

    def tell_tiles(self) -> None:
        """Report new tiles. Tiles that are computed again after a death are reported once."""
        at_work = sum(call.tiles for call in self.calls)
        new = self._finished_tiles + at_work - self._told_tiles
        if new > 0:
            self._told_tiles += new
            self._call(partial(self.on_tiles, new))

    def settle(self) -> bool:
        """Whether the slide is over; if so, the thread that runs it resumes."""
        if self.error is not None:
            self.waiting.clear()
        if self.calls or self.waiting:
            return False
        if self.error is not None:
            self.stop(self.error)
        elif not self.future.done():
            self.future.set_result(None)
        return True

    def stop(self, error: BaseException) -> None:
        """Raise an error in the thread that runs the slide, unless it has resumed."""
        self.waiting.clear()
        if not self.future.done():
            self.future.set_exception(error)

    def _wait_again(self, blocks: Sequence[Block]) -> None:
        if not self.future.done():
            self.waiting.extendleft(reversed(blocks))

    def _count(self, records: Sequence[BlockRecord]) -> None:
        self._finished_tiles += sum(record.num_tiles for record in records)
        for record in records:
            self._call(partial(self.on_block, record))

    def _call(self, callback: Callable[[], None]) -> None:
        if self.future.done():
            return
        try:
            callback()
        except BaseException as error:  # noqa: BLE001 - it belongs to who runs the slide
            self.stop(error)


def choose(
    slides: Sequence[SlideRun], node: str, num_workers: int
) -> tuple[SlideRun, tuple[Block, ...]] | None:
    """Take the next blocks for a free worker, first of its own machine's slides, then of others.

    Args:
        slides: at work, the oldest first.
        node: the worker's machine.
        num_workers: on that machine.

    Returns:
        The slide and its next blocks, which are taken off the list; None if nothing waits.
    """
    waiting = [slide for slide in slides if slide.waiting]
    if not waiting:
        return None
    own = [slide for slide in waiting if slide.home == node]
    free = [slide for slide in waiting if slide.home is None]
    if own:
        slide = own[0]
    elif free:
        slide = free[0]
        slide.home = node
    else:
        slide = max(waiting, key=lambda entry: len(entry.waiting))
    # Fewer towards the end, so that all workers end together. One by one after a death, so that
    # the block that kills its worker is known.
    count = 1 if slide.tries else max(len(slide.waiting) // (2 * num_workers), 1)
    count = min(count, MOST_BLOCKS, len(slide.waiting))
    return slide, tuple(slide.waiting.popleft() for _ in range(count))
