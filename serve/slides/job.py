"""The steps before and after the blocks of a slide: planning it, and writing its outputs.

A job can be sent to another machine that sees the same slides and the same output folder.
"""

from pathlib import Path

from serve.contract.strict import Strict
from serve.images.readers.registry import open_reader
from serve.slides.cohort import SlideTask
from serve.slides.damage import forget_damaged
from serve.slides.errors import ResultError
from serve.slides.finish import OnStep, finish
from serve.slides.finished import check_finished, refuse_other_files
from serve.slides.options import RunOptions
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
        settings = settings_of(options.settings, tissue)
        if job.target.exists():
            refuse_other_files(job.target)
            if not options.overwrite:
                formats = formats_of(job.formats)
                check_finished(job.target, slide, job.model, settings, options.outputs, formats)
                work.remove()
                return False
        plan, mask = plan_slide(slide, job.model, settings, tissue)
        if options.overwrite:
            _keep_only(work, plan)
        work.begin(plan, mask)
        forget_damaged(work, plan)
    return True


def _keep_only(work: WorkFolder, plan: Plan) -> None:
    """Remove work of another plan, and outputs of any: the same command goes on with its blocks."""
    try:
        found = work.plan()
    except ResultError:  # of another version, or damaged
        found = None
    if found is None or found.key != plan.key:
        work.remove()
    else:
        work.forget_outputs()


def conclude(job: SlideJob, on_step: OnStep = lambda _: None) -> None:
    """Write the outputs of a slide whose blocks are done.

    Raises:
        SlideError: the slide is not the one that was planned.
        OutputError: the disk is full or may not be written.
    """
    plan = job.work.plan()
    if plan is None:
        raise ResultError(f"{job.work.path} has no plan: begin the slide first.")
    with open_planned(plan) as slide:
        formats = formats_of(job.formats)
        finish(job.work, plan, slide, formats, job.options.outputs, on_step=on_step)
