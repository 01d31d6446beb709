"""Which slides are meant: files, folders, or a CSV with a path and options per slide."""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator

from serve.contract.refusal import first_problem
from serve.contract.strict import Strict
from serve.contract.tables import TableError, exists, named_file, read_table
from serve.images.mpp import MAX_MPP, MIN_MPP
from serve.images.readers.dicom import series_in
from serve.images.readers.registry import READERS
from serve.images.readers.slide_files import is_file, is_folder_of_mirax, parts_in
from serve.slides.errors import CohortError
from serve.slides.options import absolute_tissue, mask_file

SUFFIXES = (
    *(".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".avs", ".czi", ".svslide"),
    *(".tif", ".tiff", ".png", ".jpg", ".jpeg", ".webp"),
)
"""What is taken for a slide in a folder; a file that is named is always tried."""
_RESERVED = ("summary", "run")
RESULT_FILES = ("run.json", "summary.json")
"""Every result has them; see `serve.slides.finish`."""
_MAX_NAME_BYTES = 200
"""Of a result: file systems allow 255, and some of its files have longer names."""


class SlideTask(Strict):
    """One slide, and what is said of it alone."""

    path: Path
    name: str = ""
    """Of its results; by default the file's, without the suffix."""
    mpp: float | None = Field(default=None, ge=MIN_MPP, le=MAX_MPP)
    """um per pixel of level 0, where the file does not say it or is wrong."""
    reader: str | None = None
    tissue: str = ""
    """auto, none, or a file with a mask or regions; by default as for all slides."""

    @field_validator("name")
    @classmethod
    def _is_one_name(cls, name: str) -> str:
        if name.startswith(".") or any(character in name for character in '/\\\0:*?"<>|'):
            raise ValueError('a name is that of a folder: no leading dot, and none of /\\:*?"<>|')
        return name

    @field_validator("mpp", "reader", mode="before")
    @classmethod
    def _nothing_is_none(cls, value: object) -> object:
        return None if value == "" else value

    def absolute(self) -> "SlideTask":
        """The same with absolute paths, for other processes."""
        tissue = self.tissue and absolute_tissue(self.tissue)
        return self.model_copy(update={"path": self.path.absolute(), "tissue": tissue})


class Outcome(Strict):
    """How a slide ended."""

    name: str
    path: str
    status: Literal["done", "kept", "failed"]
    """`kept`: it was finished before, with the same slide, model and settings."""
    reason: str = ""
    """Why it failed."""
    code: str = ""
    """Names the kind of failure."""
    seconds: float = 0.0
    num_tiles: int = 0
    """Tiles that ran now."""


def find_slides(paths: Sequence[Path]) -> tuple[list[SlideTask], list[Outcome]]:
    """The slides that are meant, and those of them that cannot be told apart.

    Args:
        paths: slides, folders of slides, or CSV files with the columns of `SlideTask`.

    Raises:
        CohortError: a path does not exist, a CSV cannot be read, or there is no slide at all.
    """
    found = [task for path in paths for task in _of(path)]
    if not found:
        raise CohortError(
            f"there is no slide in {', '.join(map(str, paths))}. Looked for {', '.join(SUFFIXES)}, "
            "DICOM and OME-Zarr."
        )
    return _named(found)


def _of(path: Path) -> Iterable[SlideTask]:
    if not exists(path):
        raise CohortError(f"{path} does not exist. Check the path; nothing was started.")
    if path.suffix.lower() == ".csv":
        if not path.is_file():  # reading a pipe would wait for ever
            raise CohortError(f"{path} is no file, expected a CSV. Check the path.")
        return _read_csv(path)
    if path.is_dir() and not is_slide_folder(path):
        return [SlideTask(path=slide) for slide in _slides_below(path)]
    return [SlideTask(path=path)]


def is_slide_folder(path: Path) -> bool:
    """Whether a folder is one slide: an OME-Zarr, or a DICOM series and nothing else."""
    if any(is_file(path / name) for name in ("zarr.json", ".zattrs")):
        return True
    try:
        return len(series_in(path)) == 1 and not any(
            entry.is_dir() or is_slide_name(entry) for entry in path.glob("[!.]*")
        )
    except OSError:  # it may not be entered
        return False


def is_result(folder: Path) -> bool:
    """Whether a folder is a slide's result: its maps and pictures are no slides of their own."""
    return all(is_file(folder / name) for name in RESULT_FILES)


def is_slide_name(path: Path) -> bool:
    """Whether a file is called as slides are, those of DICOM left out."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def slide_files(folder: Path) -> list[tuple[Path, ...]]:
    """The slides in a folder that are not folders: a file each, or the files of a DICOM series.

    What is called as slides are, and is a pipe or a link to nothing, is among them. Pictures that
    a VMS or VMU file names are not.
    """
    parts = parts_in(folder)
    found = [
        (path,)
        for path in folder.iterdir()
        if is_slide_name(path) and path not in parts and not path.is_dir()
    ]
    return sorted([*found, *series_in(folder)])


def _slides_below(folder: Path, seen: set[Path] | None = None) -> list[Path]:
    """The slides of a folder and of those in it; links are followed, in a circle only once.

    A folder that may not be looked into is among them, so that it fails alone and is told.
    """
    seen = set() if seen is None else seen
    if folder.resolve() in seen:
        return []
    seen.add(folder.resolve())
    if is_result(folder):
        return []
    try:
        found = [files[0] for files in slide_files(folder)]
        entries = sorted(folder.iterdir())
    except OSError:
        return [folder]
    for path in entries:
        if path.is_dir() and not path.name.startswith(".") and not is_folder_of_mirax(path):
            found += [path] if is_slide_folder(path) else _slides_below(path, seen)
    return sorted(found)


def _read_csv(path: Path) -> list[SlideTask]:
    """The rows of a CSV; relative paths are from its folder."""
    try:
        table = read_table(path)
        _check_columns(path, table.columns)
        return [_read_row(path, line, row) for line, row in table.records()]
    except (OSError, TableError) as error:
        raise CohortError(f"{path} cannot be read as a CSV: {error}.") from error


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    known = list(SlideTask.model_fields)
    if "path" not in columns or set(columns) - set(known):
        raise CohortError(
            f"{path} has the columns {', '.join(columns) or 'none'}, expected path and any of "
            f"{', '.join(known[1:])}, each once."
        )


def _read_row(path: Path, line: int, row: Mapping[str, str]) -> SlideTask:
    where = f"{path}, line {line}"
    try:
        task = SlideTask.model_validate({name: cell for name, cell in row.items() if cell})
    except ValidationError as error:
        raise CohortError(f"{where}: {first_problem(error)}.") from error
    slide = named_file(path.parent, str(task.path))
    if not exists(slide):
        raise CohortError(f"{where}: {slide} does not exist.")
    if task.reader is not None and task.reader not in READERS:
        raise CohortError(
            f"{where}: reader is {task.reader!r}, expected one of {', '.join(READERS)}, or nothing."
        )
    tissue = task.tissue
    if tissue and mask_file(tissue) is not None:
        mask = named_file(path.parent, tissue)
        if not is_file(mask):
            raise CohortError(
                f"{where}: tissue is {tissue!r}, expected auto, none, or a file with a mask or "
                f"regions, and {mask} is no file."
            )
        tissue = str(mask)
    return task.model_copy(update={"path": slide, "tissue": tissue})


def _named(tasks: Sequence[SlideTask]) -> tuple[list[SlideTask], list[Outcome]]:
    """Name the slides; a name that is taken already, also in other letters, is a problem."""
    named: dict[str, SlideTask] = {}
    problems = []
    for task in tasks:
        name = task.name or name_of(task.path)
        task = task.model_copy(update={"name": name})
        key = same_name(name)
        other = named.get(key)
        reason = name_problem(task.path, name)
        if reason:
            reason = f"{reason}, or give another `name` in a CSV."
        elif other is None:
            named[key] = task
            continue
        elif other.path.resolve() == task.path.resolve():
            if task == other.model_copy(update={"path": task.path}):
                continue
            reason = "it is listed twice with other options. Leave one out."
        else:
            reason = (
                f"its result would be called {name}, as that of {other.path}. Give each a `name` "
                "of its own in a CSV."
            )
        told = {"reason": reason, "code": CohortError.code}
        problems.append(Outcome(name=name, path=str(task.path), status="failed", **told))
    return list(named.values()), problems


def same_name(name: str) -> str:
    """The same for names that some system takes for one: in other letters, or spelt otherwise."""
    return unicodedata.normalize("NFC", name).casefold()


def name_problem(path: Path, name: str) -> str:
    """Why a slide cannot have a result of that name, without a full stop; empty where it can."""
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in f"{path}{name}"):
        return (
            "its path has control characters, or is not in UTF-8, so it cannot be written down. "
            "Rename the file or its folder"
        )
    if same_name(name) in _RESERVED:
        return f"a result may not be called {name}. Rename the file"
    num_bytes = len(name.encode())
    if num_bytes > _MAX_NAME_BYTES:
        return (
            f"its result's name would have {num_bytes} bytes, at most {_MAX_NAME_BYTES} are "
            "possible. Rename the file"
        )
    return ""


def name_of(path: Path) -> str:
    """The name of a slide's result: that of its file, without the suffix."""
    has_suffix = any(map(str.isalpha, path.suffix))  # DICOM's are often called 1.2.840.1
    is_folder = path.is_dir() and path.suffix != ".zarr"
    stem = path.stem if has_suffix and not is_folder else path.name
    return stem.removesuffix(".ome").lstrip(".") or "slide"
