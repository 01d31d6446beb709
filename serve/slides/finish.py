"""From done blocks to a result: outputs, summary, passport, and the folder that appears whole."""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError

from serve.contract.machine import Machine, installed_versions, peak_memory_mib, this_machine
from serve.contract.manifest import sha256_of
from serve.contract.strict import Strict
from serve.images.readers.reader import RegionReader
from serve.slides.block_record import BlockRecord
from serve.slides.cohort import RESULT_FILES
from serve.slides.disk import appearing, write_whole, written
from serve.slides.errors import ResultError, unreadable
from serve.slides.options import OutputOptions
from serve.slides.outputs.format import SlideFormat, SlideResult
from serve.slides.outputs.ome_zarr import OME_ZARR
from serve.slides.plan import Plan
from serve.slides.store import MASK_FILE, OUTPUT_MARKER, WorkFolder
from serve.slides.summary import SlideSummary, summarise
from serve.slides.tiling import Tiling

PASSPORT_FILE, SUMMARY_FILE = RESULT_FILES
REMEDY = "Make the result again with --overwrite."
"""For a finished result that is damaged."""
_PACKAGES = (
    "focalpath",
    "openslide-bin",
    "openslide-python",
    "tifffile",
    "zarr",
    "numpy",
    "pillow",
)

OnStep = Callable[[str], None]
T = TypeVar("T", bound=Strict)


class Passport(Strict):
    """`run.json`: what a result was made from, how, and what is in it."""

    schema_version: Literal[1] = 1
    name: str
    plan: Plan
    options: OutputOptions
    formats: tuple[str, ...]
    num_blocks: int
    num_tiles: int = Field(description="that ran")
    num_tiles_once: int = Field(description="without those that two blocks ran")
    seconds: dict[str, float] = Field(
        description="of each stage, over all blocks: how long the blending thread waited for "
        "reading, for the model and for writing, and how long it blended; and of each output"
    )
    bound_by: str = Field(description="the stage with most of these seconds")
    peak_memory_mib: int = Field(description="of the largest process that worked on the slide")
    machine: Machine = Field(description="that wrote the outputs")
    hosts: tuple[str, ...] = Field((), description="machines that computed blocks")
    packages: dict[str, str]
    files: dict[str, str] = Field(description="SHA-256 of each file of the result")
    checksum: str = Field("", description="SHA-256 of all the other fields, to notice damage")

    def sealed(self) -> "Passport":
        """The same with its checksum."""
        return self.model_copy(update={"checksum": self._own_checksum()})

    @property
    def is_as_written(self) -> bool:
        """Whether the fields fit the checksum; earlier versions wrote none."""
        return self.checksum in ("", self._own_checksum())

    def _own_checksum(self) -> str:
        content = self.model_dump_json(exclude={"checksum"})
        return hashlib.sha256(content.encode()).hexdigest()


def finish(
    work: WorkFolder,
    plan: Plan,
    reader: RegionReader,
    formats: Sequence[SlideFormat],
    options: OutputOptions,
    on_step: OnStep,
) -> None:
    """Write all outputs into the work folder's result.

    What is there already was written whole, by a run that was stopped, and is kept.

    Raises:
        OutputError: the disk is full or may not be written.
        SlideError: the slide was replaced meanwhile.
    """
    records = work.records()
    tiling = Tiling(plan, work.mask())
    missing = [block for block in tiling.blocks if block not in records]
    assert not missing, missing
    notes = (*reader.notes, *reader.contradiction)
    summary = summarise(work.name, plan, records.values(), notes)
    result = SlideResult(work.name, work.store, plan, summary, reader, options)
    seconds = _stage_seconds(records.values())
    with written(work.path):
        shutil.copyfile(work.path / MASK_FILE, work.result / MASK_FILE)
        _remove_partials(work.result)
        seconds |= _write_all(work, result, formats, on_step)
        write_whole(work.result / SUMMARY_FILE, summary.model_dump_json(indent=2).encode())
        if work.records().keys() != records.keys():
            raise ResultError(
                f"{work.path} was changed by another run meanwhile. Give the same command again "
                "when no other run works on the slide."
            )
        reader.check_unchanged()  # outputs have pictures of it
        on_step("passport")
        passport = _passport(work, result, formats, seconds, tiling.num_unique_tiles())
        write_whole(
            work.result / PASSPORT_FILE, passport.model_dump_json(indent=2).encode() + b"\n"
        )


def _passport(
    work: WorkFolder,
    result: SlideResult,
    formats: Sequence[SlideFormat],
    seconds: dict[str, float],
    num_tiles_once: int,
) -> Passport:
    records = work.records().values()
    stages = {name: value for name, value in seconds.items() if "output" not in name}
    own_peak = round(peak_memory_mib())
    machine, packages = _environment()
    return Passport(
        name=work.name,
        plan=result.plan,
        options=result.options,
        formats=tuple(entry.name for entry in formats),
        num_blocks=len(records),
        num_tiles=sum(record.num_tiles - record.num_reused for record in records),
        num_tiles_once=num_tiles_once,
        seconds=seconds,
        bound_by=max(stages, key=lambda name: stages[name]) if records else "nothing",
        peak_memory_mib=max([own_peak, *(record.peak_memory_mib for record in records)]),
        machine=machine,
        hosts=tuple(sorted({record.host for record in records if record.host})),
        packages=packages,
        files=_hash_files(work.result, None if OME_ZARR in formats else work.store),
    ).sealed()


@cache
def _environment() -> tuple[Machine, dict[str, str]]:
    """This machine and the packages; drivers and files are asked once, not per slide."""
    return this_machine(), installed_versions(_PACKAGES)


def publish(work: WorkFolder, target: Path) -> None:
    """Move the finished result to where it belongs, and remove the work folder.

    Raises:
        OutputError: the disk may not be written.
    """
    formats = read_passport(work.result).formats
    with written(target):
        if OME_ZARR.name not in formats:
            shutil.rmtree(work.store, ignore_errors=True)
        if target.exists():
            target.rename(work.path / "replaced")
        work.result.rename(target)
        work.remove()


def refuse_no_result(folder: Path) -> None:
    """Raise ResultError for what is no result, damaged or not, and so is never replaced.

    Also for a folder that may not be looked into, such as a file system's `lost+found`.
    """
    try:
        (folder / PASSPORT_FILE).stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ResultError(
            f"{folder} has no {PASSPORT_FILE}, so it is not a finished result. Move it away or "
            "choose another --out."
        ) from error
    except OSError as error:
        raise _unopened(folder / PASSPORT_FILE, error) from error


def read_passport(folder: Path) -> Passport:
    """The passport of a finished result.

    Raises:
        ResultError: there is none, or it cannot be read.
    """
    refuse_no_result(folder)
    return _read(folder / PASSPORT_FILE, Passport)


def read_summary(folder: Path) -> SlideSummary:
    """The numbers of a finished result.

    Raises:
        ResultError: they cannot be read.
    """
    return _read(folder / SUMMARY_FILE, SlideSummary)


def _read(path: Path, kind: type[T]) -> T:
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise unreadable(path, REMEDY) from error
    except OSError as error:
        raise _unopened(path, error) from error


def _unopened(path: Path, error: OSError) -> ResultError:
    remedy = "Ask its owner to let you." if isinstance(error, PermissionError) else REMEDY
    return ResultError(f"{path} cannot be read: {error.strerror}. {remedy}")


def _hash_files(folder: Path, skip: Path | None) -> dict[str, str]:
    """SHA-256 of every file of a result, by its path in the folder.

    Without the passport, and without what is below `skip`.
    """
    return {
        path.relative_to(folder).as_posix(): sha256_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path != folder / PASSPORT_FILE
        and (skip is None or skip not in path.parents)
    }


def _write_all(
    work: WorkFolder, result: SlideResult, formats: Sequence[SlideFormat], on_step: OnStep
) -> dict[str, float]:
    """Write outlines here and maps in another thread; returns the seconds of each output.

    Two at the same time, and no more: each format has as much memory as it may need. Outlines are
    traced once for all formats of them. Maps come after the OME-Zarr, from whose pyramid they are
    written, also where it is not kept.
    """
    outlines = [entry for entry in formats if entry.is_outlines]
    maps = [OME_ZARR, *(e for e in formats if not e.is_outlines and e is not OME_ZARR)]
    stopped = threading.Event()

    def write(entries: Sequence[SlideFormat]) -> dict[str, float]:
        seconds = {}
        try:
            for entry in entries:
                if stopped.is_set():
                    break
                on_step(entry.title)
                started = time.perf_counter()
                _write_once(work, result, entry)
                seconds[f"output {entry.name}"] = round(time.perf_counter() - started, 3)
        except BaseException:
            stopped.set()
            raise
        return seconds

    with ThreadPoolExecutor(1, thread_name_prefix="outputs") as pool:
        others = pool.submit(write, maps)
        mine = write(outlines)  # here, so that Ctrl-C ends what takes longest
        return others.result() | mine


def _write_once(work: WorkFolder, result: SlideResult, entry: SlideFormat) -> None:
    """Write an output unless it is there as it was written; it appears whole."""
    path = entry.path(work.result, work.name)
    done = work.path / f"{OUTPUT_MARKER}{entry.name}"
    if done.exists() and done.read_bytes() == _digest(path):
        return
    if entry is OME_ZARR:  # in place: its blocks are written whole, and its metadata last
        entry.write(result, path)
        work.check_plan(result.plan)
    else:
        with appearing(path) as partial:
            entry.write(result, partial)
            work.check_plan(result.plan)
    write_whole(done, _digest(path))


def _digest(path: Path) -> bytes:
    """Of a file, or of all files of a folder, to notice what a power failure has damaged."""
    if path.is_dir():
        return hashlib.sha256(json.dumps(_hash_files(path, None)).encode()).digest()
    return sha256_of(path).encode() if path.is_file() else b""


def _remove_partials(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    for path in folder.rglob("*"):
        if path.name.endswith(".partial"):
            path.unlink()


def _stage_seconds(records: Iterable[BlockRecord]) -> dict[str, float]:
    total: dict[str, float] = {}
    for record in records:
        for stage, seconds in record.seconds.items():
            total[stage] = round(total.get(stage, 0.0) + seconds, 3)
    return total
