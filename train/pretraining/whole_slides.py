"""Whole slides as a source of views, read as serving reads them (`serve.images.readers`).

SLIDES/*.svs, *.tiff, ...   any format that a reader takes; a folder of DICOM files or an OME-Zarr
SLIDES/folds.csv            optional: img_id (the file's name), fold (-1 test, 0 validation, others
                            training), and, if need be, group (the patient) and mpp
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.contract import errors as serve_errors
from serve.images.readers.errors import SlideScaleError
from serve.images.readers.reader import RegionReader
from serve.images.readers.registry import open_reader
from serve.images.readers.slide_files import dicom_files
from train.data.folds import FoldsRow, read_folds
from train.errors import DatasetError, FocalPathError, ScaleError, SourceError
from train.pretraining.footprints import Footprint
from train.pretraining.regions import TISSUE_MPP, SlideInfo, check_enlargement, tissue_mask

FOLDS_FILE = "folds.csv"
_SUFFIXES = (
    *(".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".avs", ".czi", ".svslide"),
    *(".tif", ".tiff", ".dcm", ".zarr"),
)
_OPEN_SLIDES = 32
"""Slides that each loading process keeps open (our choice)."""
_KEPT_MASKS = 512
_MAX_OVERVIEW_PX = 2**28
"""Largest coarsest level that is read to find tissue, in pixels."""


@dataclass(frozen=True)
class SlideFile:
    """A slide on disk, and its entry in folds.csv."""

    path: Path
    fold: int
    group: str
    mpp: float | None
    """um per pixel of level 0, if the user overrides the file."""


def has_slides(root: Path) -> bool:
    """Whether a folder holds something that looks like a slide."""
    return root.is_dir() and any(_is_slide(path) for path in root.iterdir())


def _is_slide(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    if path.suffix.lower() in _SUFFIXES:
        return True
    is_result = (path / "run.json").is_file() and (path / "summary.json").is_file()
    return path.is_dir() and not is_result and bool(dicom_files(path))


def find_slides(root: Path) -> list[SlideFile]:
    """The slides of a folder by name, all for training where there is no folds.csv.

    Raises:
        DatasetError: folds.csv names a slide that is not there, or leaves one out.
    """
    paths = {path.name: path for path in sorted(root.iterdir()) if _is_slide(path)}
    if not (root / FOLDS_FILE).is_file():
        return [SlideFile(path, 1, path.stem, None) for path in paths.values()]
    rows: dict[str, FoldsRow] = {}
    by_stem = {path.stem: name for name, path in paths.items()}
    for row in read_folds(root / FOLDS_FILE):
        name = row.tile_id if row.tile_id in paths else by_stem.get(row.tile_id)
        if name is None:
            raise DatasetError(
                f"{root / FOLDS_FILE} names {row.tile_id}, and no slide in {root} is called so; "
                "expected the files' names in img_id. Correct the name, or remove the line."
            )
        rows[name] = row
    missing = [name for name in paths if name not in rows]
    if missing:
        raise DatasetError(
            f"{root / FOLDS_FILE} has no line for {len(missing)} of {len(paths)} slides, such as "
            f"{missing[0]}; expected all, since a slide for testing must not be learned from. Add "
            "lines img_id,fold, with fold 1 for training and -1 for testing."
        )
    return [
        SlideFile(path, rows[name].fold, rows[name].group or path.stem, rows[name].mpp)
        for name, path in paths.items()
    ]


class WholeSlides:
    """A `RegionSource` of slides on disk. Footprints count from the scanned part's corner.

    Each process opens the slides for itself, and keeps the last ones open.

    Raises:
        ScaleError: a slide's um per pixel is not known.
        SourceError: a slide cannot be opened, or has no coarse level.
    """

    def __init__(self, files: Sequence[SlideFile]) -> None:
        self._files = tuple(files)
        self.slides: Sequence[SlideInfo] = _described(self._files)
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._readers: OrderedDict[int, RegionReader] = OrderedDict()
        self._masks: OrderedDict[int, tuple[NDArray[np.uint8], int]] = OrderedDict()

    def read(self, slide: int, footprint: Footprint, size_px: int) -> NDArray[np.uint8]:
        """Read a square as (size_px, size_px, 3) uint8, from the level that fits."""
        check_enlargement(footprint, size_px, self.slides[slide].base_mpp)
        with _translated():
            reader = self._reader(slide)
            size = reader.require_pixel_size()
            return reader.read_um(
                footprint.y_um + reader.bounds.y * size.y,
                footprint.x_um + reader.bounds.x * size.x,
                size_px,
                size_px,
                footprint.side_um / size_px,
            )

    def tissue_share(self, slide: int, footprint: Footprint) -> float:
        """Share of tissue in a square, in [0, 1]."""
        packed, width = self._mask(slide)
        top, left = int(footprint.y_um / TISSUE_MPP), int(footprint.x_um / TISSUE_MPP)
        side = max(1, round(footprint.side_um / TISSUE_MPP))
        rows = np.unpackbits(packed[top : top + side], axis=1, count=width)
        return float(rows[:, left : left + side].mean()) if rows.size else 0.0

    def _reader(self, slide: int) -> RegionReader:
        if self._process != os.getpid():
            self._forget()  # a forked process must not share the file's position
        with self._lock:
            if (reader := self._readers.get(slide)) is None:
                file = self._files[slide]
                reader = self._readers[slide] = open_reader(file.path, mpp=file.mpp)
            self._readers.move_to_end(slide)
            while len(self._readers) > _OPEN_SLIDES:
                self._readers.popitem(last=False)[1].close()
        return reader

    def _mask(self, slide: int) -> tuple[NDArray[np.uint8], int]:
        """Where a slide is tissue at 8 um per pixel, packed by eight along rows, and its width."""
        if (kept := self._masks.get(slide)) is None:
            with _translated():
                found = tissue_mask(self._reader(slide).thumbnail(TISSUE_MPP))
            kept = self._masks[slide] = np.packbits(found, axis=1), found.shape[1]
        self._masks.move_to_end(slide)
        while len(self._masks) > _KEPT_MASKS:
            self._masks.popitem(last=False)
        return kept

    def __getstate__(self) -> dict[str, object]:
        """A loader's worker opens its own slides."""
        return {"_files": self._files, "slides": self.slides}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Restore what is known of the slides, without opening them."""
        self.__dict__.update(state)
        self._forget()


def _described(files: Sequence[SlideFile]) -> list[SlideInfo]:
    """Open each slide once. One error reports all slides that cannot be used."""
    slides, errors = [], []
    for file in files:
        try:
            slides.append(_describe(file))
        except FocalPathError as error:
            errors.append(error)
    if errors:
        first = errors[0]
        more = f" ({len(errors)} of {len(files)} slides cannot be used.)" if len(files) > 1 else ""
        raise type(first)(f"{first}{more}") from first
    return slides


def _describe(file: SlideFile) -> SlideInfo:
    with _translated(), open_reader(file.path, mpp=file.mpp) as reader:
        size = reader.require_pixel_size()
        last = reader.levels[-1]
        if last.width_px * last.height_px > _MAX_OVERVIEW_PX:
            raise SourceError(
                f"{file.path.name} has no coarse level: its smallest is {last.width_px} x "
                f"{last.height_px} pixels. Convert it to a pyramidal TIFF, with levels down to "
                "about 8 um per pixel."
            )
        return SlideInfo(
            name=file.path.name,
            width_um=reader.bounds.width * size.x,
            height_um=reader.bounds.height * size.y,
            base_mpp=max(size),
            group=file.group,
        )


@contextmanager
def _translated() -> Iterator[None]:
    """Turn the readers' errors into those of this package.

    Raises:
        ScaleError: the um per pixel are not known.
        SourceError: a slide is damaged, or of a kind that no reader takes.
    """
    try:
        yield
    except SlideScaleError as error:
        raise ScaleError(f"{error} Here that is {FOLDS_FILE} beside the slides.") from error
    except serve_errors.FocalPathError as error:
        raise SourceError(str(error)) from error
