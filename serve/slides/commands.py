"""Segments whole slides, shows how far they are, and verifies results: `python -m serve slides`."""

import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from serve.contract.errors import FocalPathError, message_of
from serve.contract.extras import how_to_install
from serve.images.readers.registry import reader_class
from serve.slides.cli import Run
from serve.slides.cohort import Outcome, find_slides
from serve.slides.engine import Engine
from serve.slides.errors import ExtraMissingError, MaskError, ResultError
from serve.slides.finish import read_summary
from serve.slides.local import open_local_engine
from serve.slides.options import RunOptions, mask_file
from serve.slides.outputs.registry import formats_of
from serve.slides.progress import watcher_of
from serve.slides.run import Cohort, run_cohort
from serve.slides.shard import Shard, write_list
from serve.slides.status import read_status, results_in
from serve.slides.status import verify as verify_result
from serve.slides.summary_csv import (
    SUMMARY_CSV,
    refuse_other_summary,
    verify_csv,
    write_cohort_csv,
)


def run(command: Run) -> int:
    """Segment slides; returns the exit status.

    Raises:
        FocalPathError: nothing can be done at all.
    """
    shard = Shard.parse(command.shard) if command.shard else Shard(0, 1)
    formats = formats_of(command.format)
    options = command.options
    _refuse_missing(options)
    refuse_other_summary(command.out)
    whole, problems = find_slides(command.slides)
    tasks = shard.of(whole) if command.shard else whole
    if command.on.cluster:  # other machines have other working directories
        command = replace(command, out=command.out.absolute())
        options, tasks = options.absolute(), [task.absolute() for task in tasks]
    with (
        closing(watcher_of(command.progress, len(tasks))) as watcher,
        closing(_open_engine(command, watcher.note)) as engine,
    ):
        cohort = Cohort(command.out, engine, options, formats, watcher, command.settings.bundle)
        write_list(command.out, whole)
        outcomes = run_cohort(cohort, tasks)
    _report(cohort, outcomes)
    # One shard is enough to tell of slides that have no name of their own.
    ended = [*(problems if shard.index == 0 else ()), *outcomes]
    failed = [outcome for outcome in ended if outcome.status == "failed"]
    for outcome in failed:
        path, name = outcome.path, Path(outcome.path).name
        told = outcome.reason.removeprefix(f"{path}: ").removeprefix(f"{name}: ")
        print(_one_line(f"error: {path}: {told}"), file=sys.stderr)
    write_cohort_csv(command.out)
    return 1 if failed else 0


def _one_line(text: str) -> str:
    """A text whose control characters are written out: a path may have a line feed."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def _open_engine(command: Run, tell: Callable[[str], None]) -> Engine:
    """The model here, or on a cluster."""
    if not command.on.cluster:
        return open_local_engine(
            command.settings, read_threads=command.options.read_threads, out=command.out
        )
    try:
        from serve.slides.cluster.engine import open_cluster_engine
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ExtraMissingError(
            f"--cluster needs Ray, which is not installed: {how_to_install('cluster')}."
        ) from error
    return open_cluster_engine(
        command.settings,
        command.on,
        tell=tell,
        read_threads=command.options.read_threads,
        out=command.out,
    )


def _refuse_missing(options: RunOptions) -> None:
    """Raise FocalPathError for a reader or a mask that would fail every slide alike."""
    if options.reader is not None:
        reader_class(options.reader)
    mask = mask_file(options.tissue)
    if mask is not None and not mask.is_file():
        raise MaskError(
            f"--tissue is {options.tissue!r}, which is no file; expected auto, none, or a file "
            "with a mask or regions."
        )


def _report(cohort: Cohort, outcomes: Sequence[Outcome]) -> None:
    """A table with the outcome of each slide."""
    table = Table(box=None, pad_edge=False)
    for name in ("slide", "result", "um/px", "tissue mm\u00b2", "largest class", "tiles", "s"):
        table.add_column(name, justify="right" if name[0] in "tu" or name == "s" else "left")
    notes = []
    for outcome in outcomes:
        mpp = tissue = largest = ""
        summary = None
        if outcome.status != "failed":
            try:
                summary = read_summary(cohort.out / outcome.name)
            except ResultError as error:  # moved away by now
                notes.append(f"note: {outcome.name}: {error}")
        if summary is not None:
            mpp, tissue = f"{summary.mpp:.4g}", f"{summary.tissue_mm2:.2f}"
            notes += [f"note: {outcome.name}: {note}" for note in summary.notes]
            most = max(summary.classes, key=lambda entry: entry.cells)
            share = f"{100 * (most.tissue_share or 0):.0f}\u00a0%"
            largest = f"{most.name} {share}" if most.cells else "-"
        numbers = (str(outcome.num_tiles), f"{outcome.seconds:.1f}")
        table.add_row(escape(outcome.name), outcome.status, mpp, tissue, escape(largest), *numbers)
    Console().print(table)
    for note in notes:
        print(_one_line(note))
    print(f"results in {cohort.out}, the areas of all slides in {cohort.out / 'summary.csv'}")


def status(out: Path) -> int:
    """Show how far each slide of an output folder is; returns the exit status."""
    found = read_status(out)
    table = Table(box=None, pad_edge=False)
    for name in ("slide", "state", "blocks"):
        table.add_column(name, justify="right" if name == "blocks" else "left")
    for slide in found:
        table.add_row(escape(slide.name), slide.state, f"{slide.blocks_done}/{slide.blocks}")
    Console().print(table)
    for slide in found:
        if slide.reason:
            print(f"{slide.name}: {slide.reason}")
        for note in slide.notes:
            print(f"note: {slide.name}: {note}")
    return 0


def verify(out: Path) -> int:
    """Check the files of the finished results; returns the exit status."""
    found = read_status(out)
    folders = results_in(out)
    for slide in found:
        if out / slide.name not in folders:
            print(f"{slide.name}: {slide.state}, so there is no result to verify")
    if not folders:
        raise ResultError(f"{out} has no finished result. Name the --out of a run.")
    failed = 0
    for folder in folders:
        try:
            print(f"{folder.name}: {verify_result(folder)} files are as written")
        except (FocalPathError, OSError) as error:
            failed += 1
            print(f"error: {message_of(error)}", file=sys.stderr)
    if not failed and any(slide.state == "running" for slide in found):
        print(f"{SUMMARY_CSV} is not verified: the run that is at work writes it at its end")
    elif not failed:
        verify_csv(out)
    return 1 if failed else 0
