"""Runs a cohort: each slide is planned, computed block by block, finished, and appears whole.

    OUT/NAME/               a finished result; see `serve.slides.finish`
    OUT/summary.csv         all finished results in numbers; see `write_cohort_csv`
    OUT/.work/NAME/         a slide in progress; see `serve.slides.store`
    OUT/.work/NAME.lock     held by the process that works on it
    OUT/.work/NAME.failed   why a slide failed, until it is done

A slide that fails does so alone. The same command again goes on where it was stopped.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from pydantic import Field

from serve.contract.errors import FocalPathError
from serve.contract.manifest import MANIFEST_FILE
from serve.contract.strict import Strict
from serve.images.readers.registry import open_reader
from serve.slides.cohort import Problem, SlideTask
from serve.slides.errors import ResultError
from serve.slides.finish import finish, publish
from serve.slides.finished import check_finished, passport_of
from serve.slides.lock import SlideBusyError, slide_lock
from serve.slides.options import OutputOptions, Settings
from serve.slides.outputs.format import SlideFormat
from serve.slides.plan import Block, ModelInfo, Plan
from serve.slides.planning import plan_slide, settings_of
from serve.slides.store import WorkFolder, write_whole, written
from serve.slides.tiling import Tiling
from serve.slides.tissue import Mask
from serve.slides.worker import OnBlock, OnTiles

WORK_FOLDER = ".work"


class Engine(Protocol):
    """Computes blocks: in this process, or on a cluster."""

    @property
    def model(self) -> ModelInfo:
        """The model that it runs."""
        ...

    def run(
        self,
        work: WorkFolder,
        blocks: Sequence[Block],
        *,
        on_block: OnBlock,
        on_tiles: OnTiles,
    ) -> None:
        """Compute blocks of a slide whose folder is begun; see `BlockWorker.run`."""
        ...

    def close(self) -> None:
        """Free what is held; not used after."""
        ...


class Watcher(Protocol):
    """Is told how a run goes. Every method may be called from any thread."""

    def begin_slide(self, name: str, num_tiles: int, num_done: int) -> None:
        """A slide begins, or goes on with `num_done` of its tiles done."""
        ...

    def add_tiles(self, name: str, num_tiles: int) -> None:
        """More tiles are done. What this raises stops the run."""
        ...

    def bound_by(self, name: str, stage: str) -> None:
        """Which stage took most of the last block."""
        ...

    def step(self, name: str, step: str) -> None:
        """An output is being written."""
        ...

    def end_slide(self, outcome: "Outcome") -> None:
        """A slide is done, or failed."""
        ...


class Outcome(Strict):
    """How a slide ended."""

    name: str
    path: str
    status: Literal["done", "kept", "failed"]
    """`kept`: it was finished before, with the same slide, model and settings."""
    reason: str = ""
    """Why it failed."""
    code: str = ""
    """Names the kind of failure."""
    seconds: float = 0.0
    num_tiles: int = 0
    """Tiles that ran now."""


class RunOptions(Strict):
    """How a cohort is run."""

    settings: Settings = Settings()
    tissue: str = "auto"
    """auto, none, or a file with a mask or regions."""
    mpp: float | None = Field(default=None)
    """um per pixel of all slides, where they do not say it or are wrong."""
    reader: str | None = None
    outputs: OutputOptions = OutputOptions()
    overwrite: bool = False
    """Replace results and work of other settings."""


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
    """Segment slides, one after the other; those that another run works on come last.

    Returns:
        One outcome per slide, in the order of `tasks`.
    """
    check = _BundleCheck(cohort.bundle)
    outcomes: dict[str, Outcome] = {}
    later = []
    for task in tasks:
        try:
            outcomes[task.name] = segment_slide(cohort, task, check=check)
        except SlideBusyError:
            later.append(task)
    for task in later:
        outcomes[task.name] = segment_slide(cohort, task, check=check, wait=True)
    return [outcomes[task.name] for task in tasks]


def segment_slide(
    cohort: Cohort,
    task: SlideTask,
    *,
    check: Callable[[], None] = lambda: None,
    wait: bool = False,
) -> Outcome:
    """Segment one slide; what goes wrong with it is in the outcome.

    Args:
        cohort: where to and how.
        task: the slide.
        check: raises where going on makes no sense.
        wait: for another run that works on the slide.

    Raises:
        SlideBusyError: another run works on it, and `wait` is false.
    """
    started = time.perf_counter()
    folder = cohort.out / WORK_FOLDER
    failed = folder / f"{task.name}.failed"
    counted = 0
    try:
        with written(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with slide_lock(folder / f"{task.name}.lock", wait=wait):
            check()
            counted, kept = _segment(cohort, task)
            failed.unlink(missing_ok=True)
        outcome = Outcome(
            name=task.name,
            path=str(task.path),
            status="kept" if kept else "done",
            seconds=round(time.perf_counter() - started, 3),
            num_tiles=counted,
        )
    except SlideBusyError:
        raise
    except (FocalPathError, OSError) as error:
        outcome = Outcome(
            name=task.name,
            path=str(task.path),
            status="failed",
            reason=" ".join(str(error).split()),
            code=getattr(error, "code", "failed"),
            seconds=round(time.perf_counter() - started, 3),
        )
        _note(failed, outcome)
    cohort.watcher.end_slide(outcome)
    return outcome


def _segment(cohort: Cohort, task: SlideTask) -> tuple[int, bool]:
    """Segment one slide; returns the tiles that ran, and whether it was finished before."""
    target = cohort.out / task.name
    mpp, reader = task.mpp or cohort.options.mpp, task.reader or cohort.options.reader
    with open_reader(task.path, reader, mpp=mpp) as slide:
        tissue = task.tissue or cohort.options.tissue
        settings = settings_of(cohort.options.settings, tissue)
        work = WorkFolder(cohort.out / WORK_FOLDER / task.name)
        if target.exists():
            passport_of(target)  # what is no result is not replaced either
            if not cohort.options.overwrite:
                check_finished(
                    target,
                    slide,
                    cohort.engine.model,
                    settings,
                    cohort.options.outputs,
                    cohort.formats,
                )
                work.remove()
                return 0, True
        if cohort.options.overwrite and work.path.exists():
            work.remove()
        plan, mask = plan_slide(slide, cohort.engine.model, settings, tissue)
        work.begin(plan, mask)
        num_tiles = _compute(cohort, work, plan, mask)
        slide.check_unchanged()
        finish(
            work,
            plan,
            slide,
            cohort.formats,
            cohort.options.outputs,
            on_step=lambda step: cohort.watcher.step(task.name, step),
        )
        publish(work, target)
        return num_tiles, False


def _compute(cohort: Cohort, work: WorkFolder, plan: Plan, mask: Mask) -> int:
    """Compute the blocks that are not done; returns how many tiles ran."""
    tiling = Tiling(plan, mask)
    tiles = {block: tiling.num_tiles(block) for block in tiling.blocks}
    done = work.records()
    todo = [block for block in tiling.blocks if block not in done]
    total = sum(tiles.values())
    left = sum(tiles[block] for block in todo)
    watcher = cohort.watcher
    watcher.begin_slide(work.name, total, total - left)
    if todo:
        cohort.engine.run(
            work,
            todo,
            on_block=lambda record: watcher.bound_by(
                work.name, max(record.seconds, key=lambda stage: record.seconds[stage])
            ),
            on_tiles=lambda count: watcher.add_tiles(work.name, count),
        )
    return left


class _BundleCheck:
    """Notices that the bundle was replaced after the model was opened."""

    def __init__(self, bundle: Path | None) -> None:
        self._manifest = None if bundle is None else bundle / MANIFEST_FILE
        self._content = self._read()

    def _read(self) -> bytes | None:
        try:
            return None if self._manifest is None else self._manifest.read_bytes()
        except OSError:
            return b""

    def __call__(self) -> None:
        if self._read() != self._content:
            raise ResultError(
                f"{self._manifest} was replaced while slides were segmented. Start again, so that "
                "all slides get the same model."
            )


def _note(path: Path, outcome: Outcome) -> None:
    """Keep why a slide failed, for `status`; where the disk is full, the report has to do."""
    try:
        write_whole(path, outcome.model_dump_json(indent=2).encode())
    except OSError:
        return


def failures(outcomes: Sequence[Outcome], problems: Sequence[Problem]) -> list[tuple[str, str]]:
    """Name and reason of everything that failed."""
    return [
        *((problem.path, problem.reason) for problem in problems),
        *((outcome.path, outcome.reason) for outcome in outcomes if outcome.status == "failed"),
    ]
