"""Runs a cohort: each slide is planned, computed block by block, finished, and appears whole.

    OUT/NAME/               a finished result; see `serve.slides.finish`
    OUT/summary.csv         all finished results in numbers; see `write_cohort_csv`
    OUT/.work/NAME/         a slide in progress; see `serve.slides.store`
    OUT/.work/NAME.lock     held by the process that works on it
    OUT/.work/NAME.failed   why a slide failed, until it is done

A slide that fails does not stop the others, whatever the reason. Repeat the command to continue
where it stopped.
"""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from serve.contract.errors import FocalPathError, message_of
from serve.contract.manifest import MANIFEST_FILE
from serve.slides.block_record import BlockRecord
from serve.slides.cohort import Outcome, SlideTask
from serve.slides.disk import write_whole, written
from serve.slides.engine import Engine, Watcher
from serve.slides.errors import ResultError
from serve.slides.finish import publish
from serve.slides.job import WORK_FOLDER, SlideJob
from serve.slides.lock import SlideBusyError, slide_lock
from serve.slides.options import RunOptions
from serve.slides.outputs.format import SlideFormat
from serve.slides.store import WorkFolder
from serve.slides.tiling import Tiling

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cohort:
    """What a run works on, and with what."""

    out: Path
    engine: Engine
    options: RunOptions
    formats: Sequence[SlideFormat]
    watcher: Watcher
    bundle: Path | None = None
    """To notice that it is replaced during the run."""


def run_cohort(cohort: Cohort, tasks: Sequence[SlideTask]) -> list[Outcome]:
    """Segment slides, as many at once as the engine asks for.

    Slides that another run works on come last. What the watcher raises stops the run.

    Returns:
        One outcome per slide, in the order of `tasks`.
    """
    run = _Run(cohort)
    run.for_each(run.segment_unless_busy, tasks)
    busy = [task for task in tasks if task.name not in run.outcomes]
    run.for_each(partial(run.segment, wait=True), busy)
    return [run.outcomes[task.name] for task in tasks]


class _Run:
    """The slides of a cohort, several at once where the engine asks for it."""

    def __init__(self, cohort: Cohort) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self._cohort = cohort
        self._manifest = self._read_manifest()
        self._is_stopping = False
        """What a closed engine raises is then not the slides' failure."""
        self._is_told = False
        """That the file system has no locks."""
        self._stopped_by: BaseException | None = None
        """What the watcher has raised."""

    def for_each(self, segment: Callable[[SlideTask], None], tasks: Sequence[SlideTask]) -> None:
        """Call a function with every slide."""
        engine = self._cohort.engine
        if engine.slides_at_once == 1 or len(tasks) <= 1:
            for task in tasks:
                segment(task)
            return
        with ThreadPoolExecutor(engine.slides_at_once, thread_name_prefix="slide") as pool:
            futures = [pool.submit(segment, task) for task in tasks]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self._is_stopping = True
                pool.shutdown(wait=False, cancel_futures=True)
                engine.close()  # ends the slides at work
                raise

    def segment_unless_busy(self, task: SlideTask) -> None:
        """Segment one slide, unless another run works on it."""
        with suppress(SlideBusyError):
            self.segment(task)

    def segment(self, task: SlideTask, *, wait: bool = False) -> None:
        """Segment one slide; what goes wrong with it is in the outcome.

        Args:
            task: the slide.
            wait: for another run that works on it.

        Raises:
            SlideBusyError: another run works on it, and `wait` is false.
            FocalPathError: the run is being stopped.
        """
        started = time.perf_counter()
        folder = self._cohort.out / WORK_FOLDER
        failed = folder / f"{task.name}.failed"
        ended: dict[str, Any]
        try:
            with written(folder):
                folder.mkdir(parents=True, exist_ok=True)
            with slide_lock(folder / f"{task.name}.lock", wait=wait) as is_held:
                if not is_held:
                    self._tell_that_there_are_no_locks()
                self._check_bundle()
                ended = self._segment(task)
                failed.unlink(missing_ok=True)
        except SlideBusyError:
            raise
        except Exception as error:
            if self._is_stopping or error is self._stopped_by:
                raise
            ended = {"status": "failed", **_told(error, task.name)}
        seconds = round(time.perf_counter() - started, 3)
        outcome = Outcome(name=task.name, path=str(task.path), seconds=seconds, **ended)
        if outcome.status == "failed":
            with suppress(OSError):  # where the disk is full, the report has to do
                write_whole(failed, outcome.model_dump_json(indent=2).encode())
        self.outcomes[task.name] = outcome
        self._cohort.watcher.end_slide(outcome)

    def _tell_that_there_are_no_locks(self) -> None:
        if not self._is_told:
            self._cohort.watcher.note(
                f"the file system of {self._cohort.out} has no locks: no other run may work on the "
                "same slides. Share them out with --shard."
            )
        self._is_told = True

    def _segment(self, task: SlideTask) -> dict[str, Any]:
        """Segment one slide; returns how it ended and how many tiles ran."""
        engine = self._cohort.engine
        job = SlideJob(
            out=self._cohort.out,
            task=task,
            options=self._cohort.options,
            formats=tuple(entry.name for entry in self._cohort.formats),
            model=engine.model,
        )
        if not engine.prepare(job):
            return {"status": "kept"}
        num_tiles = self._compute(job.work)
        engine.finish(job, lambda step: self._watcher().step(task.name, step))
        publish(job.work, job.target)
        return {"status": "done", "num_tiles": num_tiles}

    def _compute(self, work: WorkFolder) -> int:
        """Compute the blocks that are not done; returns how many tiles ran for them."""
        tiling = Tiling(work.plan(), work.mask())
        tiles = {block: tiling.num_tiles(block) for block in tiling.blocks}
        done = work.records()
        todo = [block for block in tiling.blocks if block not in done]
        total = sum(tiles.values())
        left = sum(tiles[block] for block in todo)
        self._watcher().begin_slide(work.name, total, total - left)

        def on_block(record: BlockRecord) -> None:
            longest = max(record.seconds, key=lambda stage: record.seconds[stage])
            self._watcher().bound_by(work.name, longest)

        def on_tiles(count: int) -> None:
            try:
                self._watcher().add_tiles(work.name, count)
            except BaseException as error:
                self._stopped_by = error
                raise

        if todo:
            self._cohort.engine.run(work, todo, on_block=on_block, on_tiles=on_tiles)
        records = (record for block, record in work.records().items() if block not in done)
        return sum(record.num_tiles - record.num_reused for record in records)

    def _watcher(self) -> Watcher:
        """Who is told how it goes; ends this slide when the run is being stopped."""
        if self._is_stopping:
            raise CancelledError
        return self._cohort.watcher

    def _check_bundle(self) -> None:
        """Raise ResultError where the bundle was replaced after the model was opened."""
        if self._read_manifest() != self._manifest:
            raise ResultError(
                f"{MANIFEST_FILE} of {self._cohort.bundle} was replaced while slides were "
                "segmented. Start again, so that all slides get the same model."
            )

    def _read_manifest(self) -> bytes | None:
        try:
            bundle = self._cohort.bundle
            return None if bundle is None else (bundle / MANIFEST_FILE).read_bytes()
        except OSError:
            return b""


def _told(error: Exception, name: str) -> dict[str, str]:
    """The reason and the code of a failure; one that nobody expected is logged, too."""
    if isinstance(error, FocalPathError | OSError | MemoryError):
        return {
            "reason": " ".join(message_of(error).split()),
            "code": getattr(error, "code", "failed"),
        }
    _log.error("slide %s failed unexpectedly", name, exc_info=error)
    reason = " ".join(f"unexpected {type(error).__name__}: {error}".split())
    return {"reason": f"{reason}. Please report it with the lines above.", "code": "unexpected"}
