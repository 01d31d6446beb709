"""The options of `python -m serve slides run`, `status` and `verify`; `commands` does the work."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from serve.contract.extras import how_to_install
from serve.settings import InferenceSettings
from serve.slides.errors import ExtraMissingError
from serve.slides.options import ClusterOptions, RunOptions


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
    """What to write beside the numbers: ome-zarr, overview, geojson, qupath (the same for slides
    that QuPath crops), dsa, ome-tiff, dicom-seg."""
    options: Annotated[RunOptions, tyro.conf.arg(name="")] = field(default_factory=RunOptions)
    """How slides are read and segmented."""
    progress: Literal["auto", "bar", "json", "quiet"] = "auto"
    """bar, json (one object per line) or quiet, on standard error; auto: bar in a
    terminal, json elsewhere."""
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
        from serve.slides import commands  # which needs the extra `slides`

        match command.command:
            case Run():
                return commands.run(command.command)
            case Status():
                return commands.status(command.command.out)
            case Verify():
                return commands.verify(command.command.out)
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("serve"):
            raise
        raise ExtraMissingError(
            f"slides need {error.name}, which is not installed: {how_to_install('slides')}."
        ) from error
