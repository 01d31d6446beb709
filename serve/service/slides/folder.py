"""The slides in the service's folder. Ids are stable, and no request names a path."""

import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from serve.contract.errors import FocalPathError, NotFoundError
from serve.images.readers.errors import SlideError
from serve.images.readers.slide_files import (
    dicom_files,
    is_file,
    is_folder_of_mirax,
    parts_of,
    state_of,
)
from serve.slides.cohort import (
    is_result,
    is_slide_folder,
    is_slide_name,
    name_of,
    name_problem,
    same_name,
    slide_files,
)

_ID_LENGTH = 16
_LOOK_AGAIN_S = 1.0
"""Shortest time between two listings of the folder because of unknown ids."""


class SlidesAwayError(FocalPathError):
    """The folder of slides is not there, or its share is not mounted."""

    code = "slides_away"


@dataclass(frozen=True)
class SlideFile:
    """A slide of the folder."""

    id: str
    """Made from its path below the folder; the same after a restart and in a copy of the folder."""
    path: Path
    file: str
    """Path below the folder, with slashes; for people."""
    name: str
    """Name of its result, as on the command line."""
    num_bytes: int | None
    """None for a folder."""
    version: str
    """Changes with its files."""
    files: tuple[Path, ...]
    """What its version is of: its files, and for DICOM the folder, to which others may be added."""
    problem: str = ""
    """Why its name keeps it from being segmented."""


class SlideFolder:
    """Lists the slides of a folder and its subfolders. Links that lead out of it are not followed.

    Args:
        path: the folder.
        out: the folder of results; pictures in it are not listed as slides.
    """

    def __init__(self, path: Path, out: Path) -> None:
        self.path = path
        self._out = out.absolute()
        self._lock = threading.Lock()
        self._known: dict[str, SlideFile] = {}
        self._known_s = self._looked_s = -_LOOK_AGAIN_S

    def slides(self) -> list[SlideFile]:
        """All slides, by their path.

        Raises:
            SlidesAwayError: the folder is not there.
        """
        if not self.path.is_dir():
            raise SlidesAwayError(
                "The service's folder of slides (--slides) is not there. Is its share mounted?"
            )
        began_s = time.monotonic()
        found = _named([self._describe(files) for files in self._paths()])
        with self._lock:
            if began_s >= self._known_s:  # else another thread has looked later, and was faster
                self._known, self._known_s = {slide.id: slide for slide in found}, began_s
            self._looked_s = time.monotonic()
        return found

    def find(self, slide_id: str) -> SlideFile:
        """The slide of an id.

        Raises:
            NotFoundError: there is none.
            SlidesAwayError: the folder is not there.
        """
        slide = self._known.get(slide_id)
        if slide is None or _version(slide.files) != slide.version:
            if time.monotonic() - self._looked_s > _LOOK_AGAIN_S or slide is not None:
                self.slides()
            slide = self._known.get(slide_id)
        if slide is None:
            raise NotFoundError(f"There is no slide {slide_id!r}. GET /slides lists all.")
        return slide

    def _paths(self) -> Iterator[tuple[Path, ...]]:
        """See `SlideFile.files`."""
        for folder, folders, _ in os.walk(self.path, followlinks=False):
            below = sorted(name for name in folders if not name.startswith("."))
            folders[:] = []  # folders still to visit
            for name in below:
                path = Path(folder, name)
                if path.absolute() == self._out or not is_inside(path, self.path):
                    continue
                if is_folder_of_mirax(path) or is_result(path):
                    continue
                if is_slide_folder(path):
                    yield path, *dicom_files(path)
                elif not path.is_symlink():
                    folders.append(name)
            for files in _slide_files(Path(folder)):
                if is_file(files[0]) and is_inside(files[0], self.path):
                    yield files

    def _describe(self, files: tuple[Path, ...]) -> SlideFile:
        path = files[0]
        file = path.relative_to(self.path).as_posix()
        digest = hashlib.sha256(file.encode("utf-8", "surrogateescape")).hexdigest()
        return SlideFile(
            id=digest[:_ID_LENGTH],
            path=path,
            file=_as_text(file),
            name=_as_text(name_of(path)),
            num_bytes=_num_bytes(files),
            version=_version(files),
            files=files,
        )


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path lies in a folder after its links are resolved."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except OSError:  # links in a circle
        return False


def without_folders(message: str, *folders: Path | None) -> str:
    """A message without the paths of the service's folders, which callers must not learn."""
    for folder in folders:
        if folder is not None:
            for spelling in (folder.resolve(), folder.absolute(), folder):
                message = message.replace(f"{spelling}/", "")
    return message


def _slide_files(folder: Path) -> list[tuple[Path, ...]]:
    """The slides of a folder that are files themselves; see `SlideFile.files`."""
    try:
        return [
            (*files, *filter(is_file, parts_of(files[0])))
            if is_slide_name(files[0])
            else (*files, folder)
            for files in slide_files(folder)
        ]
    except OSError:  # not permitted, or removed since it was listed
        return []


def _num_bytes(files: Sequence[Path]) -> int | None:
    try:
        if files[0].is_dir():
            return None
        return sum(file.stat().st_size for file in files if file.is_file())
    except OSError:  # removed since it was listed
        return None


def _as_text(name: str) -> str:
    """A file's name, with question marks for bytes that are not UTF-8."""
    return name.encode("utf-8", "replace").decode()


def _version(files: Sequence[Path]) -> str:
    try:
        state = state_of(files)
    except SlideError:
        return ""
    text = repr([numbers for _, *numbers in state])
    return hashlib.sha256(text.encode()).hexdigest()[:_ID_LENGTH]


def _named(slides: list[SlideFile]) -> list[SlideFile]:
    """The slides in order. Those that would share a result get a problem."""
    taken = Counter(same_name(slide.name) for slide in slides)
    found = []
    for slide in sorted(slides, key=lambda slide: slide.file):
        problem = name_problem(slide.path, slide.name)
        if problem:
            problem = f"{problem[0].upper()}{problem[1:]}."
        elif taken[same_name(slide.name)] > 1:
            problem = f"Another slide's result would be called {slide.name}, too. Rename one."
        found.append(replace(slide, problem=problem))
    return found
