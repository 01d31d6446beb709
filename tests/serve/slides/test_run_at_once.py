"""Several slides at once, as an engine of many machines asks for."""

import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from serve.contract.interrupts import safe_interrupts
from serve.inference.batching import TileAnswer
from serve.slides.cohort import SlideTask
from serve.slides.engine import Watcher
from serve.slides.job import SlideJob
from serve.slides.local import LocalEngine
from serve.slides.options import RunOptions
from serve.slides.pixels import TilePixels
from serve.slides.plan import Block
from serve.slides.run import Cohort, run_cohort
from serve.slides.store import WorkFolder
from tests.support.interrupts import deaf_main_thread, send_from_here
from tests.support.slide_models import PositionModel, model_info
from tests.support.slides import tissue_pixels, write_aperio


class AtOnce(LocalEngine):
    """Lets slides wait for each other; ends them when it is closed."""

    def __init__(self, num_slides: int) -> None:
        super().__init__(PositionModel(), model_info(), max_batch_size=2)
        self._num_slides = num_slides
        self.closed = threading.Event()
        self.together = threading.Barrier(num_slides)

    @property
    def slides_at_once(self) -> int:
        return self._num_slides

    def run(self, work: WorkFolder, blocks: Sequence[Block], **callbacks: Any) -> None:
        self.together.wait(60)
        super().run(work, blocks, **callbacks)

    def wait_until_closed(self) -> None:
        assert self.closed.wait(60)
        raise CancelledError

    def close(self) -> None:
        self.closed.set()
        self.together.abort()


def tasks_of(folder: Path, count: int) -> list[SlideTask]:
    slide = write_aperio(folder / "slide.svs", tissue_pixels(200, 200))
    return [SlideTask(path=slide, name=f"slide{number}") for number in range(count)]


@pytest.mark.slow
def test_as_many_slides_are_at_work_as_the_engine_asks_for(tmp_path: Path) -> None:
    engine = AtOnce(3)  # none goes on before three are there
    outcomes = run_cohort(
        Cohort(tmp_path / "out", engine, RunOptions(), (), Watcher()), tasks_of(tmp_path, 6)
    )
    assert [outcome.status for outcome in outcomes] == ["done"] * 6
    assert [outcome.name for outcome in outcomes] == [f"slide{number}" for number in range(6)]


def test_the_model_goes_from_one_slide_to_the_next_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next slide is read before, and the last block of the one before is written after."""
    tasks = tasks_of(tmp_path, 2)
    is_read, is_asked = threading.Event(), threading.Event()
    num_tiles = 0
    reading: set[TilePixels] = set()
    read_chunks, write_block = TilePixels._read_chunks, WorkFolder.write_block

    class Model(PositionModel):
        def submit(self, tile: NDArray[np.uint8], outputs: Sequence[str]) -> Future[TileAnswer]:
            if num_tiles:
                assert is_read.wait(60)
                if self.num_tiles >= 2 * num_tiles:
                    is_asked.set()
            return super().submit(tile, outputs)

    def read(self: TilePixels, *place: Any) -> Any:
        reading.add(self)
        if len(reading) == 2:
            is_read.set()
        return read_chunks(self, *place)

    def write(self: WorkFolder, *block: Any) -> None:
        assert is_asked.wait(60)
        write_block(self, *block)

    model = Model()

    def segment(out: str, tasks: list[SlideTask]) -> None:
        engine = LocalEngine(model, model_info(), max_batch_size=2)
        outcomes = run_cohort(Cohort(tmp_path / out, engine, RunOptions(), (), Watcher()), tasks)
        assert {outcome.status for outcome in outcomes} == {"done"}

    segment("alone", tasks[:1])
    num_tiles = model.num_tiles
    monkeypatch.setattr(TilePixels, "_read_chunks", read)
    monkeypatch.setattr(WorkFolder, "write_block", write)
    segment("out", tasks)
    assert model.num_tiles == 3 * num_tiles


def test_what_stops_one_slide_stops_all_and_none_is_told_as_failed(tmp_path: Path) -> None:
    class Stop(RuntimeError):
        pass

    class Stopping(Watcher):
        def add_tiles(self, name: str, num_tiles: int) -> None:
            raise Stop

    class Waiting(AtOnce):
        def run(self, work: WorkFolder, blocks: Sequence[Block], **callbacks: Any) -> None:
            self.together.wait(60)
            if work.name != "slide0":
                self.wait_until_closed()
            callbacks["on_tiles"](1)

    started: list[str] = []

    class Engine(Waiting):
        def prepare(self, job: SlideJob) -> bool:
            started.append(job.task.name)
            return super().prepare(job)

    engine = Engine(3)
    cohort = Cohort(tmp_path / "out", engine, RunOptions(), (), Stopping())
    with pytest.raises(Stop):
        run_cohort(cohort, tasks_of(tmp_path, 8))
    assert engine.closed.is_set()
    assert len(started) < 8
    assert not list((tmp_path / "out" / ".work").glob("*.failed"))


def test_a_slide_whose_model_goes_on_ends_when_another_stops_the_run(tmp_path: Path) -> None:
    stopping, closed = threading.Event(), threading.Event()

    class Engine(LocalEngine):
        def close(self) -> None:
            closed.set()

    class Stopping(Watcher):
        def add_tiles(self, name: str, num_tiles: int) -> None:
            if not stopping.is_set():  # whichever slide has the model first
                stopping.set()
                raise RuntimeError
            assert closed.wait(60)

    engine = Engine(PositionModel(), model_info(), max_batch_size=2)
    cohort = Cohort(tmp_path / "out", engine, RunOptions(), (), Stopping())
    with pytest.raises(RuntimeError):
        run_cohort(cohort, tasks_of(tmp_path, 2))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".work"]


def test_an_interrupt_that_does_not_wake_the_main_thread_stops_the_slides(tmp_path: Path) -> None:
    stopped: list[bool] = []

    class Engine(AtOnce):
        def run(self, work: WorkFolder, blocks: Sequence[Block], **callbacks: Any) -> None:
            self.together.wait(60)
            if work.name == "slide0":
                send_from_here()
            stopped.append(self.closed.wait(60))
            raise CancelledError

        def close(self) -> None:
            self.closed.set()  # both have met by then: one may still be on its way from there

    engine = Engine(2)
    cohort = Cohort(tmp_path / "out", engine, RunOptions(), (), Watcher())
    with (
        safe_interrupts(),
        deaf_main_thread(),
        pytest.raises(KeyboardInterrupt),
    ):
        run_cohort(cohort, tasks_of(tmp_path, 2))
    assert stopped == [True, True]
