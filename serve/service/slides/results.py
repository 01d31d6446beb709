"""Finished results of the service's slides: what is in them, and their files to download."""

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from serve.contract.errors import NotFoundError
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
    version: str

    @property
    def store(self) -> Path:
        """The path of its OME-Zarr.

        Raises:
            NotFoundError: it was not written.
        """
        store = OME_ZARR.path(self.folder, self.folder.name)
        if not store.is_dir():
            raise NotFoundError(
                f"The result of {self.folder.name} has no OME-Zarr. Segment it again with ome-zarr "
                "among its formats."
            )
        return store

    def files(self) -> tuple[ResultFile, ...]:
        """The files that can be downloaded."""
        name = self.folder.name
        listed = [
            (entry.file.format(name=name), entry.title, entry.description, entry.media_type)
            for entry in FORMATS.values()
        ]
        found = []
        for file, title, description, media_type in (*listed, *_OTHERS):
            path = self.folder / file
            if path.exists():
                num_bytes = None if path.is_dir() else path.stat().st_size
                found.append(
                    ResultFile(
                        file=file,
                        title=title,
                        description=description,
                        media_type="application/zip" if path.is_dir() else media_type,
                        num_bytes=num_bytes,
                    )
                )
        return tuple(found)

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
            files=self.files(),
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
        folder = self.out / name
        try:
            found = (folder / PASSPORT_FILE).stat()
        except OSError:
            return None
        version = f"{found.st_ino:x}{found.st_mtime_ns:x}"
        kept = self._kept.get(name)
        if kept is not None and kept.version == version:
            return kept
        try:
            passport = read_passport(folder)
            summary = read_summary(folder)
        except ResultError as error:
            message = without_folders(str(error), self.out)
            raise NotFoundError(message, code=error.code) from error
        result = Result(folder, passport, summary, version)
        self._kept[name] = result
        return result

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

    def download(self, name: str, file: str) -> tuple[Path, ResultFile]:
        """The path of an output, by its name in the list of a result's files.

        Raises:
            NotFoundError: there is no such result or file.
        """
        result = self.get(name)
        for entry in result.files():
            if entry.file == file:
                return result.folder / file, entry
        raise NotFoundError(f"The result of {name} has no file {file!r}.")


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
    """The parts of a folder's zip, which is kept neither in memory nor on disk.

    Its files are stored as they are, since they are compressed.
    """
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            if not path.is_file():
                continue
            entry = zipfile.ZipInfo(path.relative_to(folder.parent).as_posix())
            with path.open("rb") as file, archive.open(entry, "w", force_zip64=True) as target:
                while chunk := file.read(_CHUNK_BYTES):
                    target.write(chunk)
                    yield sink.taken()
    yield sink.taken()
