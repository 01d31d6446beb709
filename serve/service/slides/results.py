"""Finished results of the service's slides: what is in them, and their files to download.

A result may be replaced by another at any time, as when its slide is segmented again.
"""

import io
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from serve.contract.errors import NotFoundError
from serve.contract.unchanged import stamp_of, while_unchanged
from serve.service.slides.cells import CELL_TILE
from serve.service.slides.documents import ResultFile, ResultInfo
from serve.service.slides.folder import without_folders
from serve.slides.errors import ResultError
from serve.slides.finish import PASSPORT_FILE, SUMMARY_FILE, Passport, read_passport, read_summary
from serve.slides.outputs.format import num_levels
from serve.slides.outputs.ome_zarr import OME_ZARR
from serve.slides.outputs.registry import FORMATS
from serve.slides.store import MASK_FILE
from serve.slides.summary import SlideSummary

_CHUNK_BYTES = 2**20
_JSON, _PNG = "application/json", "image/png"
_OTHERS = (
    (SUMMARY_FILE, "Summary", "areas and confidence per class", _JSON),
    (PASSPORT_FILE, "Run record", "model, settings, versions, times and checksums", _JSON),
    (MASK_FILE, "Tissue mask", "where tissue was found", _PNG),
)


@dataclass(frozen=True)
class Result:
    """One finished result."""

    folder: Path
    passport: Passport
    summary: SlideSummary
    files: tuple[ResultFile, ...]
    """That can be downloaded."""
    version: str

    @property
    def store(self) -> Path:
        """The path of its OME-Zarr.

        Raises:
            NotFoundError: it was not written.
        """
        store = OME_ZARR.path(self.folder, self.folder.name)
        if all(entry.file != store.name for entry in self.files):
            raise NotFoundError(
                f"The result of {self.folder.name} has no OME-Zarr. Segment it again with ome-zarr "
                "among its formats."
            )
        return store

    def info(self, fingerprint: str) -> ResultInfo:
        """The description of the result.

        Args:
            fingerprint: of the slide file as it is now.
        """
        plan = self.passport.plan
        rows, columns = plan.shape
        return ResultInfo(
            summary=self.summary,
            is_of_this_file=plan.slide.fingerprint == fingerprint,
            width_cells=columns,
            height_cells=rows,
            cell_px=(plan.level0_px_per_cell[1], plan.level0_px_per_cell[0]),
            origin_px=(plan.origin_px[1], plan.origin_px[0]),
            tile_cells=CELL_TILE,
            num_levels=num_levels(plan.shape),
            version=self.version,
            files=self.files,
        )


class Results:
    """The results of a folder, as `python -m serve slides run` leaves them."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._kept: dict[str, Result] = {}

    def find(self, name: str) -> Result | None:
        """The finished result of this name, or None.

        Raises:
            NotFoundError: it is damaged, or of another version.
        """
        if name not in self._kept and not self.has(name):
            return None
        try:
            return while_unchanged(self.out / name, lambda: self._find(name))
        except FileNotFoundError:
            self._kept.pop(name, None)
            return None
        except ResultError as error:
            message = without_folders(str(error), self.out)
            raise NotFoundError(message, code=error.code) from error

    def _find(self, name: str) -> Result:
        folder = self.out / name
        found = (folder / PASSPORT_FILE).stat()
        version = f"{found.st_ino:x}{found.st_mtime_ns:x}"
        kept = self._kept.get(name)
        if kept is None or kept.version != version:
            kept = Result(folder, read_passport(folder), read_summary(folder), (), version)
            self._kept[name] = kept
        return replace(kept, files=_files(folder))

    def has(self, name: str) -> bool:
        """Whether there is a finished result."""
        return (self.out / name / PASSPORT_FILE).is_file()

    def get(self, name: str) -> Result:
        """The finished result of a name.

        Raises:
            NotFoundError: there is none that can be read.
        """
        result = self.find(name)
        if result is None:
            raise NotFoundError(f"{name} has no result yet. POST /jobs segments it.")
        return result

    def download(self, name: str, file: str) -> tuple[Path, os.stat_result, ResultFile]:
        """The path of an output, by its name in the list of a result's files.

        Raises:
            NotFoundError: there is no such result or file.
        """

        def find() -> tuple[Path, os.stat_result, ResultFile]:
            result = self.get(name)
            for entry in result.files:
                if entry.file == file:
                    path = result.folder / file
                    return path, path.stat(), entry
            raise NotFoundError(f"The result of {name} has no file {file!r}.")

        return while_unchanged(self.out / name, find)


def _files(folder: Path) -> tuple[ResultFile, ...]:
    name = folder.name
    listed = [
        (entry.file.format(name=name), entry.title, entry.description, entry.media_type)
        for entry in FORMATS.values()
    ]
    found = []
    for file, title, description, media_type in (*listed, *_OTHERS):
        path = folder / file
        if path.exists():
            is_folder = path.is_dir()
            found.append(
                ResultFile(
                    file=file,
                    title=title,
                    description=description,
                    media_type="application/zip" if is_folder else media_type,
                    num_bytes=None if is_folder else path.stat().st_size,
                )
            )
    return tuple(found)


class _Sink(io.RawIOBase):
    """A file for zipfile to write to, which cannot seek."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        part = bytes(data)  # type: ignore[call-overload]
        self._parts.append(part)
        return len(part)

    def taken(self) -> bytes:
        """Return what was written since the last call."""
        found = b"".join(self._parts)
        self._parts.clear()
        return found


def zip_folder(folder: Path) -> Iterator[bytes]:
    """The parts of the zip of a result's folder, which is kept neither in memory nor on disk.

    Its files are stored as they are, since they are compressed.

    Raises:
        ResultError: another result took the place of this one; the zip must not end as if whole.
        OSError: likewise.
    """
    sink = _Sink()
    before = stamp_of(folder.parent)
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            if not path.is_file():
                continue
            entry = zipfile.ZipInfo(path.relative_to(folder.parent).as_posix())
            with path.open("rb") as file, archive.open(entry, "w", force_zip64=True) as target:
                while chunk := file.read(_CHUNK_BYTES):
                    target.write(chunk)
                    yield sink.taken()
        if not before or stamp_of(folder.parent) != before:
            raise ResultError(f"{folder.name} was replaced while it was downloaded.")
    yield sink.taken()
