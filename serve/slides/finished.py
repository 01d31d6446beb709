"""Finished results in an output folder: whether one is what is asked for, and all in numbers."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from serve.contract.tables import is_other_file
from serve.images.readers.reader import RegionReader
from serve.slides.disk import write_whole, written
from serve.slides.errors import ResultError
from serve.slides.finish import PASSPORT_FILE, read_passport, read_summary
from serve.slides.options import OutputOptions, Settings
from serve.slides.outputs.format import SlideFormat
from serve.slides.plan import ModelInfo, Plan
from serve.slides.store import WorkFolder
from serve.slides.summary import SlideSummary, cohort_csv

SUMMARY_CSV = "summary.csv"


def refuse_other_files(target: Path) -> None:
    """Raise ResultError for what is no result, damaged or not, and so is never replaced."""
    if not (target / PASSPORT_FILE).exists():
        raise ResultError(
            f"{target} is in the way: it has no run.json, so it is no result. Move it away or "
            "choose another --out."
        )


def refuse_other_summary(out: Path) -> None:
    """Raise ResultError where a folder's `summary.csv` is of something else, and would be lost."""
    if is_other_file(out / SUMMARY_CSV, ("slide", "class")):
        raise ResultError(
            f"{out / SUMMARY_CSV} is in the way: it is no summary of slides. Move it away or "
            "choose another --out."
        )


def check_finished(
    target: Path,
    slide: RegionReader,
    model: ModelInfo,
    settings: Settings,
    outputs: OutputOptions,
    formats: Iterable[SlideFormat],
) -> None:
    """Raise ResultError unless a finished result is of this slide, model, settings and outputs."""
    passport = read_passport(target)
    assert passport is not None, target
    read_summary(target)  # a damaged one fails this slide, not the report of all
    found = passport.plan
    made = {
        "the slide": (found.slide.fingerprint, slide.fingerprint()),
        "its um per pixel": (found.slide.pixel_size, slide.require_pixel_size()),
        "the model": (found.model, model),
        "the settings": (found.settings, settings),
        "the options of outputs": (passport.options, outputs),
        "the formats": (set(passport.formats), {entry.name for entry in formats}),
    }
    differs = [name for name, (old, new) in made.items() if old != new]
    if differs:
        raise ResultError(
            f"{target} was made differently: {', '.join(differs)} differ. Replace it with "
            "--overwrite, or choose another --out."
        )


def plan_in(folder: Path) -> Plan | None:
    """The plan of a result, or of work in progress; None where there is none that can be read."""
    try:
        passport = read_passport(folder)
        return WorkFolder(folder).plan() if passport is None else passport.plan
    except ResultError:
        return None


def finished(out: Path) -> dict[str, SlideSummary]:
    """The numbers of all finished results in a folder, by name.

    Damaged results are left out: they must not keep the others' numbers from the cohort's.
    """
    found = {}
    for folder in sorted(out.iterdir()):
        with suppress(ResultError):
            if not folder.name.startswith(".") and read_passport(folder) is not None:
                found[folder.name] = read_summary(folder)
    return found


def write_cohort_csv(out: Path) -> None:
    """Write `summary.csv` of all finished results in a folder.

    Runs that end at the same time all write it. Each looks again after it has written, so that
    the last one has seen all results, without a lock.

    Raises:
        OutputError: the disk is full or may not be written.
    """
    with written(out):
        out.mkdir(parents=True, exist_ok=True)
        content = cohort_csv(finished(out))
        while True:
            write_whole(out / SUMMARY_CSV, content)
            latest = cohort_csv(finished(out))
            if latest == content:
                return
            content = latest
