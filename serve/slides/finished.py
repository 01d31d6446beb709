"""Finished results in an output folder: their plans, and all in numbers."""

from contextlib import suppress
from pathlib import Path

from serve.contract.tables import is_other_file
from serve.slides.disk import write_whole, written
from serve.slides.errors import ResultError
from serve.slides.finish import read_passport, read_summary
from serve.slides.plan import Plan
from serve.slides.store import WorkFolder
from serve.slides.summary import SlideSummary, cohort_csv

SUMMARY_CSV = "summary.csv"


def refuse_other_summary(out: Path) -> None:
    """Raise ResultError where a folder's `summary.csv` is of something else, and would be lost."""
    if is_other_file(out / SUMMARY_CSV, ("slide", "class")):
        raise ResultError(
            f"{out / SUMMARY_CSV} is in the way: it is no summary of slides. Move it away or "
            "choose another --out."
        )


def plan_in(folder: Path) -> Plan | None:
    """The plan of a result, or of work in progress; None where there is none that can be read."""
    with suppress(ResultError):
        return read_passport(folder).plan
    with suppress(ResultError):
        return WorkFolder(folder).plan()
    return None


def finished(out: Path) -> dict[str, SlideSummary]:
    """The numbers of all finished results in a folder, by name.

    Damaged results are left out: they must not keep the others' numbers from the cohort's.
    """
    found = {}
    for folder in sorted(out.iterdir()):
        with suppress(ResultError):
            if not folder.name.startswith("."):
                read_passport(folder)
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
