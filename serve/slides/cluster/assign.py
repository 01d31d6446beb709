"""Chooses the blocks for a free worker. Without Ray: `dispatch` carries out what is chosen.

Ray's `ActorPool` hands the next task to any free actor, and an actor keeps its task when it dies.
Here a slide's blocks prefer one machine, whose cache then has the slide's file, and a block whose
worker died goes to whichever worker is free.
"""

from collections.abc import Sequence

from serve.slides.cluster.slide_run import SlideRun
from serve.slides.plan import Block

MOST_BLOCKS = 8
"""Most blocks of one call. Within a call, a worker reads ahead from block to block."""


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
