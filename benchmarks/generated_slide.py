"""What benchmarks of slides share: a drawn slide, their options, the run, and a clock for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import tifffile
import tyro
from numpy.typing import NDArray

from benchmarks.real_size_model import draw_tiles
from serve.images.readers.registry import open_reader
from serve.settings import InferenceSettings
from serve.slides.cohort import Outcome, SlideTask
from serve.slides.engine import Watcher
from serve.slides.run import Cohort, run_cohort

_TISSUE_SHARE = 1 / 3
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SlideOptions:
    """Options of every benchmark of a generated slide."""

    settings: tyro.conf.OmitArgPrefixes[InferenceSettings]
    """How to run the model."""
    out: Path = Path("artifacts/results/slides")
    """Folder for the report."""
    side_px: int = 8192
    """Side of the slide."""
    drawn_px: int = 1024
    """Side of the synthetic images that the slide is made of."""


class Clock(Watcher, Generic[T]):
    """Records when the tiles of a slide began and ended.

    Args:
        now: the time.
    """

    def __init__(self, now: Callable[[], T]) -> None:
        self._now = now
        self._is_computing = True
        self.began = self.computed = now()

    def begin_slide(self, name: str, num_tiles: int, num_done: int) -> None:
        """See `Watcher`."""
        self._is_computing = True
        self.began = self.computed = self._now()

    def step(self, name: str, step: str) -> None:
        """See `Watcher`; the first step ends the tiles."""
        if self._is_computing:
            self._is_computing = False
            self.computed = self._now()


def segment(cohort: Cohort, slides: Sequence[Path]) -> list[Outcome]:
    """Run the whole command on slides, none of which may fail."""
    outcomes = run_cohort(cohort, [SlideTask(path=path, name=path.stem) for path in slides])
    for outcome in outcomes:
        assert outcome.status == "done", outcome.reason
    return outcomes


def write_slide(
    path: Path,
    height: int,
    width: int,
    mpp: float,
    drawn_px: int,
    *,
    tissue_share: float = _TISSUE_SHARE,
) -> None:
    """Write a JPEG pyramid with synthetic tissue in the middle of its area."""
    drawn = draw_tiles(4, drawn_px)
    pixels = np.full((height, width, 3), 243, np.uint8)
    side = tissue_share**0.5
    top, left = int(height * (1 - side) / 2), int(width * (1 - side) / 2)
    rng = np.random.default_rng(0)
    for y in range(top, height - top, drawn_px):
        for x in range(left, width - left, drawn_px):
            flip = rng.choice([1, -1], 2)
            tile = drawn[rng.integers(len(drawn))][:: flip[0], :: flip[1]]
            part = pixels[y : min(y + drawn_px, height - top), x : min(x + drawn_px, width - left)]
            part[...] = tile[: part.shape[0], : part.shape[1]]
    description = f"Aperio Image Library\r\n{width}x{height} JPEG/RGB Q=85|AppMag = 20|MPP = {mpp}"
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for step in (1, 4, 16):
            tiff.write(
                np.ascontiguousarray(pixels[::step, ::step]),
                description=description,
                tile=(256, 256),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 85},
                subfiletype=int(step > 1),
                metadata=None,
            )


def tiles_in_memory(path: Path, tile: int) -> NDArray[np.uint8]:
    """Cut (16, T, T, 3) uint8 tiles out of a slide's middle."""
    with open_reader(path) as slide:
        width, height = slide.levels[0].width_px, slide.levels[0].height_px
        middle = slide.read(0, width // 3, height // 3, 4 * tile, 4 * tile)
    return np.stack(
        [
            middle[y : y + tile, x : x + tile]
            for y in range(0, 4 * tile, tile)
            for x in range(0, 4 * tile, tile)
        ]
    )
