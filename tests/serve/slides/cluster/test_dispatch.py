"""What becomes of blocks whose workers fail, with actors that do as they are told."""

import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the extra `cluster` is not installed")

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from serve.contract.errors import FocalPathError
from serve.contract.interrupts import safe_interrupts
from serve.settings import InferenceSettings
from serve.slides.block_record import BlockRecord
from serve.slides.cluster import dispatch
from serve.slides.cluster.dispatch import Dispatcher, Worker
from serve.slides.cluster.slide_run import SlideRun
from serve.slides.cluster.worker import Opening, Problem, Ready, Report
from serve.slides.errors import ClusterError, WorkerDiedError, WorkerFailedError
from serve.slides.plan import Block
from serve.slides.store import WorkFolder
from tests.support.errors import raises
from tests.support.interrupts import DEADLINE_S, deaf_main_thread, send_from_here
from tests.support.meanwhile import before_call
from tests.support.slide_models import model_info


@dataclass(eq=False)
class Reference:
    value: object


class Method:
    def __init__(self, call: Callable[..., object]) -> None:
        self._call = call

    def options(self, **_: object) -> "Method":
        return self

    def remote(self, *arguments: object) -> Reference:
        return Reference(self._call(*arguments))


class Actor:
    """Does what `script` says with its calls of `run`, then as it should.

    ok, die, forget (it was restarted), raise, or an error's reason.
    """

    def __init__(self, *script: str, opens: object = None, node: str = "node") -> None:
        self._script = list(script)
        self.ran: Counter[Block] = Counter()
        ready = Ready(node=node, host=node, model=model_info(), versions={})
        self._opens = ready if opens is None else opens
        self.open, self.run, self.progress = (
            Method(self._open),
            Method(self._run),
            Method(lambda: (0, 0)),
        )

    def _open(self, opening: Opening) -> object:
        return self._opens

    def _run(self, path: Path, blocks: Sequence[Block], ticket: int) -> object:
        match self._script.pop(0) if self._script else "ok":
            case "die":
                return ActorUnavailableError("died", b"0" * 16)
            case "forget":
                return None
            case "raise":
                return RayTaskError("run", "Traceback", TypeError("a bug"))
            case "ok":
                self.ran.update(blocks)
                return Report(records=tuple(record(block) for block in blocks))
            case reason:
                return Report(records=(), problem=Problem(code="slide_region", reason=reason))


def record(block: Block) -> BlockRecord:
    return BlockRecord(
        row=block.row,
        column=block.column,
        num_tiles=3,
        seconds={},
        cells=(1,),
        confidence_sums=(0,),
        low_confidence_cells=(0,),
    )


class FakeRay:
    """The calls of Ray that the dispatcher makes."""

    @staticmethod
    def wait(
        references: list[Reference], num_returns: int, timeout: float
    ) -> tuple[list[Reference], list[Reference]]:
        return references, []

    @staticmethod
    def get(reference: Reference) -> object:
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value

    @staticmethod
    def kill(handle: object) -> None:
        pass


class Crew:
    """A dispatcher of some actors, and what it told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self._dispatchers: list[Dispatcher] = []

    def of(
        self, *actors: Actor, head: Callable[[], ClusterError | None] = lambda: None
    ) -> Dispatcher:
        opening = Opening(settings=InferenceSettings(), versions={})
        workers = [Worker(actor) for actor in actors]
        self._dispatchers.append(Dispatcher(workers, opening, tell=self.told.append, head=head))
        return self._dispatchers[-1]

    def close(self) -> None:
        for dispatcher in self._dispatchers:
            dispatcher.close()


@pytest.fixture
def crew(monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    monkeypatch.setattr(dispatch, "ray", FakeRay)
    made = Crew()
    yield made
    made.close()


class Slide:
    """A slide of ten blocks of three tiles, and what was told of it."""

    def __init__(self, folder: Path) -> None:
        self.blocks = [Block(0, column) for column in range(10)]
        self.tiles: list[int] = []
        self.recorded: list[Block] = []
        self.run = SlideRun(
            WorkFolder(folder / "slide"),
            deque(self.blocks),
            lambda found: self.recorded.append(found.block),
            self.tiles.append,
        )


@pytest.fixture
def slide(tmp_path: Path) -> Slide:
    return Slide(tmp_path)


@pytest.mark.parametrize("script", [(), ("die",), ("forget",), ("ok", "die", "die", "forget")])
def test_every_block_is_done_once_whatever_becomes_of_a_worker(
    script: tuple[str, ...], crew: Crew, slide: Slide
) -> None:
    actors = [Actor(*script), Actor()]
    crew.of(*actors).run(slide.run)
    assert actors[0].ran + actors[1].ran == Counter(slide.blocks)
    assert sorted(slide.recorded, key=lambda block: block.column) == slide.blocks
    assert sum(slide.tiles) == 30
    assert len(crew.told) == script.count("die")


@pytest.mark.parametrize(
    ("script", "kind", "named"),
    [
        (("die", "die", "die"), WorkerDiedError, "block 0_0"),
        (("raise",), WorkerFailedError, "TypeError: a bug"),
    ],
)
def test_what_kills_its_worker_or_nobody_expected_fails_its_slide_alone(
    script: tuple[str, ...],
    kind: type[ClusterError],
    named: str,
    crew: Crew,
    slide: Slide,
    tmp_path: Path,
) -> None:
    actor = Actor(*script)
    dispatcher = crew.of(actor)
    with raises(kind, named) as caught:
        dispatcher.run(slide.run)
    assert "\n" not in str(caught.value)
    assert not actor.ran
    other = Slide(tmp_path / "other")
    dispatcher.run(other.run)
    assert actor.ran == Counter(other.blocks)


def test_a_users_mistake_keeps_its_code(crew: Crew, slide: Slide) -> None:
    with raises(FocalPathError, "cut off", code="slide_region"):
        crew.of(Actor("ok", "the slide is cut off")).run(slide.run)


def test_a_worker_that_cannot_open_the_model_is_left_out(crew: Crew, slide: Slide) -> None:
    broken = Actor(opens=Problem(code="bundle_missing", reason="no bundle on node 2"))
    dead = Actor(opens=ActorDiedError())
    crew.of(broken, dead, Actor()).run(slide.run)
    assert len(slide.recorded) == 10
    assert any("no bundle on node 2" in line for line in crew.told)
    assert len(crew.told) == 2


def test_without_any_worker_slides_fail_and_the_error_says_how_to_go_on(
    crew: Crew, slide: Slide
) -> None:
    with raises(ClusterError, "finished blocks are kept", code="cluster_unusable"):
        crew.of(Actor(opens=Problem(code="bundle_missing", reason="no bundle"))).run(slide.run)


def test_what_a_callback_raises_stops_the_slide(crew: Crew, slide: Slide) -> None:
    class Stop(RuntimeError):
        pass

    def stop(_: int) -> None:
        raise Stop

    slide.run.on_tiles = stop
    with pytest.raises(Stop):
        crew.of(Actor()).run(slide.run)


def test_blocks_of_a_slide_that_was_stopped_do_not_wait_again(slide: Slide) -> None:
    def stop(_: BlockRecord) -> None:
        raise RuntimeError

    slide.run.on_block = stop
    first, second, third = (
        slide.run.begin((slide.run.waiting.popleft(),), ticket) for ticket in range(3)
    )
    slide.run.end(first, [record(slide.blocks[0])])
    slide.run.worker_died(second, "node")
    slide.run.give_back(third)
    assert not slide.run.waiting
    assert slide.run.settle()
    with pytest.raises(RuntimeError):
        slide.run.future.result()


def test_an_interrupt_that_does_not_wake_the_main_thread_stops_its_wait(
    crew: Crew, slide: Slide
) -> None:
    was_woken: list[bool] = []
    woken = threading.Event()

    def interrupt(_: BlockRecord) -> None:
        if not was_woken:
            send_from_here()
            was_woken.append(woken.wait(DEADLINE_S))

    slide.run.on_block = interrupt
    dispatcher = crew.of(Actor())
    with safe_interrupts(), deaf_main_thread():
        try:
            with pytest.raises(KeyboardInterrupt):
                dispatcher.run(slide.run)
        finally:
            woken.set()
    dispatcher.close()
    assert was_woken == [True]


def test_when_the_head_is_lost_every_slide_fails_with_that(crew: Crew, tmp_path: Path) -> None:
    lost: list[ClusterError] = []
    dispatcher = crew.of(Actor(), head=lambda: lost[0] if lost else None)
    slide, later = Slide(tmp_path), Slide(tmp_path)
    slide.run.on_block = lambda _: lost.append(ClusterError("the head is lost"))
    for run in (slide.run, later.run):
        with raises(ClusterError, "the head is lost"):
            dispatcher.run(run)


@pytest.mark.parametrize("lost", [None, ClusterError("the head is lost")])
def test_a_slide_that_comes_just_as_the_run_ends_does_not_wait_for_ever(
    lost: ClusterError | None, crew: Crew, slide: Slide, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[ClusterError] = []
    dispatcher = crew.of(Actor(), head=lambda: told[0] if told else None)

    class New(queue.SimpleQueue[SlideRun]):
        def put(self, item: SlideRun, block: bool = True, timeout: float | None = None) -> None:
            told.extend([lost] if lost else [])
            dispatcher.close()
            super().put(item)

    def is_over() -> None:
        assert slide.run.future.done()

    monkeypatch.setattr(dispatcher, "_new", New())
    before_call(monkeypatch, slide.run.future, "result", is_over)
    with pytest.raises(ClusterError if lost else CancelledError):
        dispatcher.run(slide.run)
