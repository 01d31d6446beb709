"""What is in an output folder: how far each slide is, and whether its files are whole."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from serve.contract.errors import FocalPathError
from serve.contract.manifest import sha256_of
from serve.contract.strict import Strict
from serve.contract.unchanged import while_unchanged
from serve.images.readers.slide_files import is_file
from serve.slides.cohort import RESULT_FILES, Outcome, is_result
from serve.slides.errors import ResultDamagedError, ResultError
from serve.slides.finish import PASSPORT_FILE, REMEDY, Passport, read_passport, read_summary
from serve.slides.job import WORK_FOLDER
from serve.slides.lock import is_locked
from serve.slides.shard import read_list
from serve.slides.store import WorkFolder
from serve.slides.summary import SlideSummary
from serve.slides.tiling import Tiling


class SlideStatus(Strict):
    """How far a slide is."""

    name: str
    state: Literal["done", "running", "stopped", "failed", "waiting"]
    """running: a process works on it; stopped: the same command again goes on with it; waiting: no
    process has begun it."""
    blocks: int = 0
    blocks_done: int = 0
    reason: str = ""
    """Why it failed."""
    notes: tuple[str, ...] = ()
    """What a user should know of a finished result."""


def read_status(out: Path) -> list[SlideStatus]:
    """How far each slide of an output folder is, by name.

    Raises:
        ResultError: the folder does not exist.
    """
    if not out.is_dir():
        raise ResultError(f"{out} is not a folder. Name the --out of a run.")
    waiting = [SlideStatus(name=name, state="waiting") for name in read_list(out)]
    at_work = list(_at_work(out))  # first: a slide that ends meanwhile is then in one of both
    found = {status.name: status for status in (*waiting, *_finished(out), *at_work)}
    return [found[name] for name in sorted(found)]


def _finished(out: Path) -> Iterator[SlideStatus]:
    for folder in results_in(out):
        try:
            passport, summary = while_unchanged(folder, partial(_numbers, folder))
        except FocalPathError as error:
            yield SlideStatus(name=folder.name, state="failed", reason=str(error))
            continue
        blocks = passport.num_blocks
        yield SlideStatus(
            name=folder.name, state="done", blocks=blocks, blocks_done=blocks, notes=summary.notes
        )


def _numbers(folder: Path) -> tuple[Passport, SlideSummary]:
    return read_passport(folder), read_summary(folder)


def results_in(out: Path) -> list[Path]:
    """The folders of finished results: also damaged ones, and those that may not be opened."""
    listed = read_list(out)  # not each closed folder is a result: some file systems have one
    return [
        folder
        for folder in sorted(out.iterdir())
        if not folder.name.startswith(".")
        and (
            any(is_file(folder / name) for name in RESULT_FILES)
            or (folder.name in listed and _is_closed(folder))
        )
    ]


def _is_closed(folder: Path) -> bool:
    """Whether it may not be looked into, as that of a user who shares nothing."""
    try:
        (folder / PASSPORT_FILE).stat()
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def _at_work(out: Path) -> Iterator[SlideStatus]:
    """The slides that are begun or failed; of one that failed and runs again, that it runs."""
    folder = out / WORK_FOLDER
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            work = WorkFolder(path)
            status = _of_work(work, failed=path.with_name(f"{path.name}.failed"))
            if work.result.is_dir() or not is_result(out / path.name):  # else it is being removed
                yield status
        elif path.suffix == ".failed" and not path.with_suffix("").is_dir():
            yield SlideStatus(name=path.stem, state="failed", reason=_reason(path))


def _of_work(work: WorkFolder, failed: Path) -> SlideStatus:
    blocks, running = 0, is_locked(work.path.with_name(f"{work.name}.lock"))
    try:
        blocks = len(Tiling(work.plan(), work.mask()).blocks) if work.has_plan else 0
    except ResultError as error:
        if not running:  # else who works on it is beginning or removing it
            return SlideStatus(name=work.name, state="failed", reason=str(error))
    reason = "" if running else _reason(failed)
    return SlideStatus(
        name=work.name,
        state="running" if running else "failed" if reason else "stopped",
        blocks=blocks,
        blocks_done=work.num_done(),
        reason=reason,
    )


def _reason(path: Path) -> str:
    try:
        return Outcome.model_validate_json(path.read_bytes()).reason
    except (OSError, ValidationError):
        return ""


def verify(folder: Path) -> int:
    """Check that a finished result is what was written; returns how many files were checked.

    One that is replaced meanwhile is checked again.

    Raises:
        ResultDamagedError: a file is missing, changed or not of the result.
    """
    return while_unchanged(folder, lambda: _verify(folder))


def _verify(folder: Path) -> int:
    passport = read_passport(folder)
    if not passport.is_as_written:
        raise ResultDamagedError(
            f"{folder / PASSPORT_FILE} was changed: its content does not fit its own checksum. "
            f"{REMEDY}"
        )
    for name, expected in passport.files.items():
        path = folder / name
        if not path.is_file():
            raise ResultDamagedError(f"{path} is missing. {REMEDY}")
        found = sha256_of(path)
        if found != expected:
            raise ResultDamagedError(
                f"{path} was changed: its SHA-256 is {found[:12]}..., run.json says "
                f"{expected[:12]}... {REMEDY}"
            )
    for top in {Path(name).parts[0] for name in passport.files if "/" in name}:
        for path in sorted((folder / top).rglob("[!.]*")):
            if path.is_file() and path.relative_to(folder).as_posix() not in passport.files:
                raise ResultDamagedError(f"{path} is not of the result. Remove it.")
    return len(passport.files)
