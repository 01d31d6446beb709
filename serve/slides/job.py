"""The steps before and after the blocks of a slide: planning it, and writing its outputs.

A job can be sent to another machine that sees the same slides and the same output folder.
"""

from pathlib import Path

from serve.contract.strict import Strict
from serve.images.readers.reader import RegionReader
from serve.images.readers.registry import open_reader
from serve.slides.cohort import SlideTask
from serve.slides.damage import forget_damaged
from serve.slides.errors import ResultError
from serve.slides.finish import OnStep, finish, read_passport, read_summary, refuse_no_result
from serve.slides.options import RunOptions, Settings
from serve.slides.outputs.registry import formats_of
from serve.slides.plan import ModelInfo, Plan
from serve.slides.planning import open_planned, plan_slide, settings_of
from serve.slides.store import WorkFolder

WORK_FOLDER = ".work"


class SlideJob(Strict):
    """One slide, what runs it, and where its result goes."""

    out: Path
    task: SlideTask
    options: RunOptions
    formats: tuple[str, ...]
    model: ModelInfo

    @property
    def target(self) -> Path:
        """Folder of the finished result."""
        return self.out / self.task.name

    @property
    def work(self) -> WorkFolder:
        """Folder of the work in progress."""
        return WorkFolder(self.out / WORK_FOLDER / self.task.name)


def prepare(job: SlideJob) -> bool:
    """Plan a slide and begin its work folder, or find what was begun.

    Returns:
        False where the slide's result is finished already.

    Raises:
        SlideError: the slide cannot be opened, or its scale is not known.
        MaskError: the mask cannot be used.
        ResultError: a result or work of another slide, model or settings is in the way.
        OutputError: the folder cannot be written to.
    """
    task, options, work = job.task, job.options, job.work
    with open_reader(
        task.path, task.reader or options.reader, mpp=task.mpp or options.mpp
    ) as slide:
        tissue = task.tissue or options.tissue
        settings = settings_of(options, tissue)
        if job.target.exists():
            refuse_no_result(job.target)
            if not options.overwrite:
                _check_finished(job, slide, settings)
                work.remove()
                return False
        plan, mask = plan_slide(slide, job.model, settings, tissue)
        if options.overwrite:
            _keep_only(work, plan)
        work.begin(plan, mask)
        forget_damaged(work, plan)
    return True


def _check_finished(job: SlideJob, slide: RegionReader, settings: Settings) -> None:
    """Raise ResultError unless a finished result is what the job would make."""
    passport = read_passport(job.target)
    read_summary(job.target)  # a damaged one fails this slide, not the report of all
    found = passport.plan
    made = {
        "the slide": (found.slide.fingerprint, slide.fingerprint()),
        "its um per pixel": (found.slide.pixel_size, slide.require_pixel_size()),
        "the model": (found.model, job.model),
        "the settings": (found.settings, settings),
        "the options of outputs": (passport.options, job.options.outputs),
        "the formats": (set(passport.formats), set(job.formats)),
    }
    differs = [name for name, (old, new) in made.items() if old != new]
    if differs:
        raise ResultError(
            f"{job.target} was made differently: {', '.join(differs)} differ. Replace it with "
            "--overwrite, or choose another --out."
        )


def _keep_only(work: WorkFolder, plan: Plan) -> None:
    """Remove work of another plan, and outputs of any: the same command goes on with its blocks."""
    try:
        is_same = work.plan().key == plan.key
    except ResultError:  # there is none, or it is of another version, or damaged
        is_same = False
    if is_same:
        work.forget_outputs()
    else:
        work.remove()


def conclude(job: SlideJob, on_step: OnStep = lambda _: None) -> None:
    """Write the outputs of a slide whose blocks are done.

    Raises:
        SlideError: the slide is not the one that was planned.
        OutputError: the disk is full or may not be written.
    """
    plan = job.work.plan()
    with open_planned(plan) as slide:
        formats = formats_of(job.formats)
        finish(job.work, plan, slide, formats, job.options.outputs, on_step)
