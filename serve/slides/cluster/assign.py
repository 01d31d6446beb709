"""Chooses the blocks for a free worker. Without Ray: `dispatch` carries out what is chosen.

Ray's `ActorPool` hands the next task to any free actor, and an actor keeps its task when it dies.
Here a slide's blocks prefer one machine, whose cache then has the slide's file, and a block whose
worker died goes to whichever worker is free.
"""

from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from serve.slides.plan import Block
from serve.slides.store import WorkFolder
from serve.slides.worker import OnBlock, OnTiles

MOST_BLOCKS = 8
"""Most blocks of one call. Within a call, a worker reads ahead from block to block."""


@dataclass(eq=False)
class SlideRun:
    """The blocks of one slide that are still to be computed."""

    work: WorkFolder
    waiting: deque[Block]
    on_block: OnBlock
    on_tiles: OnTiles
    home: str | None = None
    """The machine that its blocks prefer."""
    at_work: int = 0
    """Number of calls that have not returned."""
    tries: Counter[Block] = field(default_factory=Counter)
    """How often a worker died while it computed a block, as far as known."""
    error: Exception | None = None
    """Why the slide fails; raised once all calls have returned."""
    finished_tiles: int = 0
    told_tiles: int = 0
    future: Future[None] = field(default_factory=Future)
    """Done when no call is running any more."""


@dataclass(eq=False)
class Call:
    """Blocks of one slide that a worker computes one after the other."""

    slide: SlideRun
    blocks: tuple[Block, ...]
    ticket: int
    tiles: int = 0
    """Number of tiles done, as the worker last reported."""


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
