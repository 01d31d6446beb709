"""Runs a cohort: each slide is planned, computed block by block, finished, and appears whole.

    OUT/NAME/               a finished result; see `serve.slides.finish`
    OUT/summary.csv         all finished results in numbers
    OUT/.work/NAME/         a slide in progress; see `serve.slides.store`
    OUT/.work/NAME.lock     held by the process that works on it
    OUT/.work/NAME.failed   why a slide failed, until it is done

A slide that fails does so alone. The same command again goes on where it was stopped.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from pydantic import Field

from serve.contract.errors import FocalPathError
from serve.contract.manifest import MANIFEST_FILE
from serve.contract.strict import Strict
from serve.images.readers.reader import RegionReader
from serve.images.readers.registry import open_reader
from serve.images.readers.scaled import ScaledView
from serve.slides.cohort import Problem, SlideTask
from serve.slides.errors import MaskError, ResultError
from serve.slides.finish import Passport, finish, publish, read_passport, read_summary
from serve.slides.lock import SlideBusyError, slide_lock
from serve.slides.options import OutputOptions, Settings
from serve.slides.outputs.format import SlideFormat
from serve.slides.plan import (
    Block,
    ModelInfo,
    Plan,
    Tiling,
    make_plan,
    mask_size,
    open_view,
)
from serve.slides.store import WorkFolder, write_whole, written
from serve.slides.summary import SlideSummary, cohort_csv
from serve.slides.tissue import Mask, find_tissue, mask_shape, read_mask
from serve.slides.worker import OnBlock, OnTiles

WORK_FOLDER, SUMMARY_CSV = ".work", "summary.csv"


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
    write_cohort_csv(cohort.out)
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
        settings = _settings(cohort.options, tissue)
        work = WorkFolder(cohort.out / WORK_FOLDER / task.name)
        if target.exists():
            passport = _passport_of(target)
            if not cohort.options.overwrite:
                _check_finished(cohort, target, passport, slide, settings)
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


def plan_slide(
    slide: RegionReader, model: ModelInfo, settings: Settings, tissue: str
) -> tuple[Plan, Mask]:
    """Plan a slide: find its tissue, or read where it is.

    Args:
        slide: open.
        model: that will run.
        settings: as `_settings` makes them of `tissue`.
        tissue: auto, none, or a file with a mask or regions.

    Raises:
        SlideScaleError: the slide's um per pixel is not known.
        MaskError: the file cannot be used.
    """
    view = open_view(slide, model)
    mask_px = mask_size(model.mpp)
    mask = _mask(view, mask_px, settings, tissue)
    return make_plan(slide, view, model, settings, mask, mask_px), mask


def _mask(view: ScaledView, mask_px: int, settings: Settings, tissue: str) -> Mask:
    match settings.tissue:
        case "auto":
            return find_tissue(view, mask_px, settings.rule)
        case "none":
            return np.ones(mask_shape(view.height_px, view.width_px, mask_px), bool)
        case "mask":
            return read_mask(Path(tissue), view, mask_px)


def _settings(options: RunOptions, tissue: str) -> Settings:
    """The settings of one slide, with what its mask's file holds."""
    if tissue in ("auto", "none"):
        return options.settings.model_copy(update={"tissue": tissue})
    try:
        sha256 = hashlib.sha256(Path(tissue).read_bytes()).hexdigest()
    except OSError as error:
        raise MaskError(f"the mask {tissue} cannot be read: {error.strerror}.") from error
    return options.settings.model_copy(update={"tissue": "mask", "mask_file_sha256": sha256})


def _passport_of(target: Path) -> Passport:
    """The passport of what stands where a result belongs.

    Raises:
        ResultError: it is no result, and is not touched.
    """
    passport = read_passport(target)
    if passport is None:
        raise ResultError(
            f"{target} is in the way: it has no run.json, so it is no result. Move it away or "
            "choose another --out."
        )
    return passport


def _check_finished(
    cohort: Cohort, target: Path, passport: Passport, slide: RegionReader, settings: Settings
) -> None:
    """Raise ResultError unless a finished result is of this slide, model and settings."""
    found = passport.plan
    made = {
        "the slide": (found.slide.fingerprint, slide.fingerprint()),
        "its um per pixel": (found.slide.mpp, slide.require_mpp()),
        "the model": (found.model, cohort.engine.model),
        "the settings": (found.settings, settings),
        "the options of outputs": (passport.options, cohort.options.outputs),
        "the formats": (set(passport.formats), {entry.name for entry in cohort.formats}),
    }
    differs = [name for name, (old, new) in made.items() if old != new]
    if differs:
        raise ResultError(
            f"{target} was made otherwise: {', '.join(differs)} differ. Replace it with "
            "--overwrite, or choose another --out."
        )


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


def finished(out: Path) -> dict[str, SlideSummary]:
    """The numbers of all finished results in a folder, by name."""
    return {
        folder.name: read_summary(folder)
        for folder in sorted(out.iterdir())
        if not folder.name.startswith(".") and read_passport(folder) is not None
    }


def write_cohort_csv(out: Path) -> None:
    """Write `summary.csv` of all finished results in a folder.

    Raises:
        OutputError: the disk is full or may not be written.
    """
    with written(out):
        write_whole(out / SUMMARY_CSV, cohort_csv(finished(out)))


def failures(outcomes: Sequence[Outcome], problems: Sequence[Problem]) -> list[tuple[str, str]]:
    """Name and reason of everything that failed."""
    return [
        *((problem.path, problem.reason) for problem in problems),
        *((outcome.path, outcome.reason) for outcome in outcomes if outcome.status == "failed"),
    ]
