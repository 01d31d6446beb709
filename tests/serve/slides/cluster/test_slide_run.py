from collections import Counter, deque
from pathlib import Path

from serve.slides.cluster.slide_run import MOST_BLOCKS, SlideRun, choose
from serve.slides.plan import Block
from serve.slides.store import WorkFolder


def slide_run(name: str, num_blocks: int, home: str | None = None) -> SlideRun:
    blocks = deque(Block(0, column) for column in range(num_blocks))
    return SlideRun(WorkFolder(Path(name)), blocks, lambda _: None, lambda _: None, home)


def test_a_worker_takes_the_blocks_of_its_own_machines_slide_first() -> None:
    away, here = slide_run("away", 50, "node 1"), slide_run("here", 2, "node 2")
    chosen = choose([away, here], "node 2", 1)
    assert chosen is not None
    assert chosen[0] is here


def test_a_slide_without_a_machine_gets_that_of_the_worker_that_takes_it() -> None:
    away, free = slide_run("away", 50, "node 1"), slide_run("free", 2)
    chosen = choose([away, free], "node 2", 1)
    assert chosen is not None
    assert chosen[0] is free
    assert free.home == "node 2"


def test_a_worker_without_work_of_its_own_helps_with_the_longest_slide() -> None:
    slides = [slide_run("short", 3, "node 1"), slide_run("long", 9, "node 1")]
    chosen = choose(slides, "node 2", 1)
    assert chosen is not None
    assert chosen[0] is slides[1]
    assert slides[1].home == "node 1"


def test_every_block_is_taken_once_in_ever_smaller_parts() -> None:
    slide = slide_run("slide", 60)
    parts = []
    while (chosen := choose([slide], "node", 2)) is not None:
        parts.append(chosen[1])
    assert Counter(block for part in parts for block in part) == Counter(
        Block(0, column) for column in range(60)
    )
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (MOST_BLOCKS, 1)


def test_blocks_of_a_slide_that_killed_a_worker_are_taken_one_by_one() -> None:
    slide = slide_run("slide", 60)
    slide.tries[Block(0, 0)] = 1
    chosen = choose([slide], "node", 1)
    assert chosen is not None
    assert chosen[1] == (Block(0, 0),)
