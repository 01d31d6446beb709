"""Segment whole slides: `python -m serve slides run`, `status` and `verify`."""

import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from serve.contract.errors import FocalPathError, SettingsError, message_of
from serve.contract.extras import how_to_install
from serve.settings import InferenceSettings
from serve.slides.errors import ExtraMissingError, ResultError
from serve.slides.options import ClusterOptions, RunOptions, mask_file

if TYPE_CHECKING:
    from serve.slides.cohort import Outcome
    from serve.slides.engine import Engine
    from serve.slides.run import Cohort


@dataclass(frozen=True, kw_only=True)
class Run:
    """Segment slides into a folder, each whole or not at all.

    Repeat the command to continue where it stopped, however it was stopped; finished slides are
    skipped. A slide that fails is named at the end, and the others are still done.
    """

    slides: tyro.conf.Positional[tuple[Path, ...]]
    """Slides, folders of slides, or CSV files with the column `path` and any of `name`, `mpp`,
    `reader` and `tissue`."""
    settings: Annotated[InferenceSettings, tyro.conf.arg(name="")] = field(
        default_factory=InferenceSettings.from_environment
    )
    """What runs the model."""
    out: Path = Path("artifacts/slides")
    """Folder to write to; made if it is missing."""
    format: tuple[str, ...] = ("ome-zarr", "overview", "geojson")
    """What to write beside the numbers: ome-zarr, overview, geojson, dsa, ome-tiff, dicom-seg."""
    options: Annotated[RunOptions, tyro.conf.arg(name="")] = field(default_factory=RunOptions)
    """How slides are read and segmented."""
    read_threads: int = 2
    """Threads that read the slide."""
    progress: Literal["auto", "bar", "json", "quiet"] = "auto"
    """bar, json (one object per line) or quiet, on standard error; auto: bar in a terminal."""
    on: Annotated[ClusterOptions, tyro.conf.arg(name="")] = field(default_factory=ClusterOptions)
    """Many machines."""
    shard: str = ""
    """I/N, from 0/N to N-1/N: work on one of N parts of the slides. Give every part the same slides
    and the same --out, on a folder that all machines share."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """Show how far each slide of an output folder is."""

    out: tyro.conf.Positional[Path]
    """The --out of the runs."""


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check that all files of the finished results are as they were written."""

    out: tyro.conf.Positional[Path]
    """The --out of the runs."""


@dataclass(frozen=True, kw_only=True)
class Slides:
    """Segment whole slides."""

    command: Annotated[
        Annotated[Run, tyro.conf.subcommand("run")]
        | Annotated[Status, tyro.conf.subcommand("status")]
        | Annotated[Verify, tyro.conf.subcommand("verify")],
        tyro.conf.arg(name=""),
    ]


def run_slides(command: Slides) -> int:
    """Do what is asked; returns the exit status.

    Raises:
        FocalPathError: nothing can be done at all.
    """
    try:
        match command.command:
            case Run():
                return _run(command.command)
            case Status():
                return _status(command.command)
            case Verify():
                return _verify(command.command)
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("serve"):
            raise
        raise ExtraMissingError(
            f"slides need {error.name}, which is not installed: {how_to_install('slides')}."
        ) from error


def _run(command: Run) -> int:
    from serve.slides.cohort import find_slides
    from serve.slides.outputs.registry import formats_of
    from serve.slides.progress import watcher_of
    from serve.slides.run import Cohort, run_cohort
    from serve.slides.shard import Shard, write_list
    from serve.slides.summary_csv import refuse_other_summary, write_cohort_csv

    shard = Shard.parse(command.shard) if command.shard else Shard(0, 1)
    formats = formats_of(command.format)
    if not 1 <= command.read_threads <= 256:
        raise SettingsError(f"--read-threads is {command.read_threads}, expected 1 to 256.")
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


def _open_engine(command: Run, tell: Callable[[str], None]) -> "Engine":
    """The model here, or on a cluster."""
    if not command.on.cluster:
        from serve.slides.local import open_local_engine

        return open_local_engine(
            command.settings, read_threads=command.read_threads, out=command.out
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
        read_threads=command.read_threads,
        out=command.out,
    )


def _refuse_missing(options: RunOptions) -> None:
    """Raise FocalPathError for a reader or a mask that would fail every slide alike."""
    from serve.images.readers.registry import reader_class
    from serve.slides.errors import MaskError

    if options.reader is not None:
        reader_class(options.reader)
    mask = mask_file(options.tissue)
    if mask is not None and not mask.is_file():
        raise MaskError(
            f"--tissue is {options.tissue!r}, which is no file; expected auto, none, or a file "
            "with a mask or regions."
        )


def _report(cohort: "Cohort", outcomes: Sequence["Outcome"]) -> None:
    """A table with the outcome of each slide."""
    from serve.slides.finish import read_summary

    table = Table(box=None, pad_edge=False)
    for name in ("slide", "result", "um/px", "tissue mm\u00b2", "largest class", "tiles", "s"):
        table.add_column(name, justify="right" if name[0] in "tu" or name == "s" else "left")
    notes = []
    for outcome in outcomes:
        mpp = tissue = largest = ""
        if outcome.status != "failed":
            summary = read_summary(cohort.out / outcome.name)
            mpp, tissue = f"{summary.mpp:.4g}", f"{summary.tissue_mm2:.2f}"
            notes += [f"note: {outcome.name}: {note}" for note in summary.notes]
            most = max(summary.classes, key=lambda entry: entry.cells)
            largest = f"{most.name} {100 * (most.tissue_share or 0):.0f} %" if most.cells else "-"
        numbers = (str(outcome.num_tiles), f"{outcome.seconds:.1f}")
        table.add_row(escape(outcome.name), outcome.status, mpp, tissue, escape(largest), *numbers)
    Console().print(table)
    for note in notes:
        print(_one_line(note))
    print(f"results in {cohort.out}, the areas of all slides in {cohort.out / 'summary.csv'}")


def _status(command: Status) -> int:
    from serve.slides.status import read_status

    found = read_status(command.out)
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


def _verify(command: Verify) -> int:
    from serve.slides.status import read_status, results_in, verify
    from serve.slides.summary_csv import verify_csv

    found = read_status(command.out)
    folders = results_in(command.out)
    for slide in found:
        if command.out / slide.name not in folders:
            print(f"{slide.name}: {slide.state}, so there is no result to verify")
    if not folders:
        raise ResultError(f"{command.out} has no finished result. Name the --out of a run.")
    failed = 0
    for folder in folders:
        try:
            print(f"{folder.name}: {verify(folder)} files are as written")
        except (FocalPathError, OSError) as error:
            failed += 1
            print(f"error: {message_of(error)}", file=sys.stderr)
    if not failed:
        verify_csv(command.out)
    return 1 if failed else 0
