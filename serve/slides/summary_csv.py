"""`summary.csv`: the numbers of all finished results in an output folder."""

import csv
import io
from contextlib import suppress
from pathlib import Path
from typing import Any

from serve.contract.tables import is_other_file
from serve.slides.disk import write_whole, written
from serve.slides.errors import ResultDamagedError, ResultError
from serve.slides.finish import read_passport, read_summary

SUMMARY_CSV = "summary.csv"


def refuse_other_summary(out: Path) -> None:
    """Raise ResultError where a folder's `summary.csv` is of something else, and would be lost."""
    if is_other_file(out / SUMMARY_CSV, ("slide", "class")):
        raise ResultError(
            f"{out / SUMMARY_CSV} is in the way: it is no summary of slides. Move it away or "
            "choose another --out."
        )


def write_cohort_csv(out: Path) -> None:
    """Write `summary.csv` of all finished results in a folder.

    Runs that end at the same time all write it. Each looks again after it has written, so that
    the last one has seen all results, without a lock.

    Raises:
        OutputError: the disk is full or may not be written.
    """
    with written(out):
        out.mkdir(parents=True, exist_ok=True)
        last: bytes | None = None
        while (content := cohort_csv(out)) != last:
            write_whole(out / SUMMARY_CSV, content)
            last = content


def verify_csv(out: Path) -> None:
    """Check that each row of `summary.csv` is a result's; a run that was stopped may lack rows.

    Raises:
        ResultDamagedError: a row differs from what the results say.
    """
    path = out / SUMMARY_CSV
    if not path.is_file():
        return
    expected = cohort_csv(out).splitlines()
    if wrong := [row for row in path.read_bytes().splitlines() if row not in expected]:
        raise ResultDamagedError(
            f"{path} has {len(wrong)} rows that differ from the results' summary.json. Give the "
            "command of the run again: it writes the file again."
        )


def cohort_csv(out: Path) -> bytes:
    """One line per slide and class.

    Damaged results are left out: they must not keep the others' numbers from the cohort's.
    """
    rows: list[dict[str, Any]] = []
    for folder in sorted(out.iterdir()):
        with suppress(ResultError):
            if not folder.name.startswith("."):
                rows += _rows(folder)
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue().encode()


def _rows(folder: Path) -> list[dict[str, Any]]:
    """The numbers of a finished result, class by class."""
    read_passport(folder)
    summary = read_summary(folder)
    slide = {
        "slide": folder.name,
        "model": summary.model.name,
        "version": summary.model.version,
        "mpp": summary.mpp,
        "mpp_source": summary.mpp_source,
        "tissue_mm2": summary.tissue_mm2,
    }
    return [
        {**slide, "class": found.name, **found.model_dump(exclude={"color", "cells", "name"})}
        for found in summary.classes
    ]
