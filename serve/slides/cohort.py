"""Which slides are meant: files, folders, or a CSV with a path and options per slide."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import Field, ValidationError, field_validator

from serve.contract.strict import Strict, first_problem
from serve.images.readers.dicom import series_in
from serve.slides.errors import CohortError

SUFFIXES = (
    *(".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".avs", ".czi", ".svslide"),
    *(".tif", ".tiff", ".png", ".jpg", ".jpeg", ".webp"),
)
"""What is taken for a slide in a folder; a file that is named is always tried."""
RESERVED = ("summary", "run")


class SlideTask(Strict):
    """One slide, and what is said of it alone."""

    path: Path
    name: str = Field(default="", max_length=200)
    """Of its results; by default the file's, without the suffix."""
    mpp: float | None = None
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
        tissue = self.tissue
        if tissue not in ("", "auto", "none"):
            tissue = str(Path(tissue).absolute())
        return self.model_copy(update={"path": self.path.absolute(), "tissue": tissue})


class Problem(Strict):
    """A slide that cannot be worked on, with the reason."""

    path: str
    name: str
    reason: str
    code: str


def find_slides(paths: Sequence[Path]) -> tuple[list[SlideTask], list[Problem]]:
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
            "*.dcm and OME-Zarr."
        )
    return _named(found)


def _of(path: Path) -> Iterable[SlideTask]:
    if not path.exists():
        raise CohortError(f"{path} does not exist. Check the path; nothing was started.")
    if path.suffix.lower() == ".csv":
        return _read_csv(path)
    if path.is_dir() and not is_slide_folder(path):
        return [SlideTask(path=slide) for slide in _slides_below(path)]
    return [SlideTask(path=path)]


def is_slide_folder(path: Path) -> bool:
    """Whether a folder is one slide: an OME-Zarr, or a DICOM series and nothing else."""
    if any((path / name).is_file() for name in ("zarr.json", ".zattrs")):
        return True
    return len(series_in(path)) == 1 and not any(
        entry.is_dir() or is_slide_name(entry) for entry in path.glob("[!.]*")
    )


def is_slide_name(path: Path) -> bool:
    """Whether a file is called as slides are, those of DICOM left out."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def slide_files(folder: Path) -> list[Path]:
    """The slides that are files of a folder; of a DICOM series, its first file."""
    found = [path for path in folder.iterdir() if is_slide_name(path) and path.is_file()]
    return sorted([*found, *(files[0] for files in series_in(folder))])


def _slides_below(folder: Path) -> list[Path]:
    found = slide_files(folder)
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            found += [path] if is_slide_folder(path) else _slides_below(path)
    return sorted(found)


def _read_csv(path: Path) -> list[SlideTask]:
    """The rows of a CSV; relative paths are from its folder."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CohortError(f"{path} cannot be read as a CSV in UTF-8: {error}.") from error
    rows = csv.DictReader(io.StringIO(text))
    columns = [name.strip() for name in rows.fieldnames or ()]
    known = list(SlideTask.model_fields)
    unknown = [name for name in columns if name not in known]
    if "path" not in columns or unknown:
        raise CohortError(
            f"{path} has the columns {', '.join(columns) or 'none'}, expected path and any of "
            f"{', '.join(known[1:])}."
        )
    rows.fieldnames = columns
    tasks = []
    for line, row in enumerate(rows, start=2):
        fields = {name: value.strip() for name, value in row.items() if name and value}
        try:
            task = SlideTask.model_validate(fields)
        except ValidationError as error:
            raise CohortError(f"{path}, line {line}: {first_problem(error)}.") from error
        slide = path.parent / task.path
        if not slide.exists():
            raise CohortError(f"{path}, line {line}: {slide} does not exist.")
        tissue = task.tissue
        if tissue not in ("", "auto", "none"):
            tissue = str(path.parent / tissue)
        tasks.append(task.model_copy(update={"path": slide, "tissue": tissue}))
    return tasks


def _named(tasks: Sequence[SlideTask]) -> tuple[list[SlideTask], list[Problem]]:
    """Name the slides; a name that is taken already, also in other letters, is a problem."""
    named: dict[str, SlideTask] = {}
    problems = []
    for task in tasks:
        name = task.name or name_of(task.path)
        task = task.model_copy(update={"name": name})
        key = name.casefold()
        other = named.get(key)
        if key in RESERVED:
            reason = f"a result may not be called {name}. Give another `name` in a CSV."
        elif other is None:
            named[key] = task
            continue
        elif other.path.resolve() == task.path.resolve():
            continue
        else:
            reason = (
                f"its result would be called {name}, as that of {other.path}. Give each a `name` "
                "of its own in a CSV."
            )
        problems.append(
            Problem(path=str(task.path), name=name, reason=reason, code=CohortError.code)
        )
    return list(named.values()), problems


def name_of(path: Path) -> str:
    """The name of a slide's result: that of its file, without the suffix."""
    stem = path.name if path.is_dir() and path.suffix != ".zarr" else path.stem
    return stem.removesuffix(".ome").lstrip(".") or "slide"
