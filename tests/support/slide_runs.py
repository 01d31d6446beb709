"""Runs of whole slides: begun, stopped in the middle, or to the end; and what they leave."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve.cli import main
from serve.images.readers.reader import RegionReader
from serve.inference.segmenter import open_segmenter
from serve.settings import InferenceSettings
from serve.slides.cohort import Outcome, SlideTask
from serve.slides.engine import Watcher
from serve.slides.local import LocalEngine, model_of
from serve.slides.options import RunOptions
from serve.slides.outputs.registry import formats_of
from serve.slides.plan import Plan, make_plan
from serve.slides.planning import plan_slide, settings_of
from serve.slides.run import Cohort, run_cohort
from serve.slides.store import WorkFolder
from serve.slides.tissue import Mask
from tests.support.slide_models import model_info


def engine_of(bundle: Path) -> LocalEngine:
    """The engine of one process, with a bundle's model."""
    segmenter = open_segmenter(InferenceSettings(bundle=bundle, threads=1))
    return LocalEngine(segmenter.backend, model_of(segmenter), max_batch_size=8)


def segment(bundle: Path, out: Path, *arguments: object) -> int:
    """The status of `python -m serve slides run` with small blocks on one core."""
    settings = ["--bundle", str(bundle), "--out", str(out), "--threads", "1", "--block-cells", "64"]
    return main(["slides", "run", *settings, *map(str, arguments)])


def cohort(
    out: Path,
    engine: Any,
    *,
    formats: Sequence[str] = ("ome-zarr",),
    watcher: Watcher | None = None,
    bundle: Path | None = None,
    **options: Any,
) -> Cohort:
    """A cohort with blocks of 64 cells, unless the options say otherwise."""
    chosen = RunOptions(**{"block_cells": 64, **options})
    return Cohort(out, engine, chosen, formats_of(formats), watcher or Watcher(), bundle)


def run_one(work: Cohort, path: Path, **fields: Any) -> Outcome:
    """Segment one slide."""
    fields.setdefault("name", path.stem)
    (outcome,) = run_cohort(work, [SlideTask(path=path, **fields)])
    return outcome


class Stop(RuntimeError):
    """What stops a run."""


class Stopping(Watcher):
    """Stops a run after so many tiles."""

    def __init__(self, after: int) -> None:
        self._left = after

    def add_tiles(self, name: str, num_tiles: int) -> None:
        self._left -= num_tiles
        if self._left < 0:
            raise Stop


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a result but the passport, which has times in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "run.json"
    }


def begin(
    folder: Path,
    reader: RegionReader,
    mask: Mask | None = None,
    *,
    tile: int = 64,
    mpp: float = 0.5,
    **options: Any,
) -> tuple[WorkFolder, Plan]:
    """Begin a slide's work folder, for the model that is known from the pixels.

    Args:
        folder: of the work.
        reader: the slide.
        mask: its tissue; by default all of it.
        tile: of the model.
        mpp: of the model.
        options: of the run.
    """
    model, settings = model_info(tile, mpp), settings_of(RunOptions(**options), "none")
    if mask is None:
        plan, mask = plan_slide(reader, model, settings, "none")
    else:
        plan = make_plan(reader, model, settings, mask)
    work = WorkFolder(folder)
    work.begin(plan, mask)
    return work, plan
