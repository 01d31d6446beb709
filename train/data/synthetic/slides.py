"""Synthetic slides for pretraining across magnifications: large drawings at 0.25 um per pixel.

Drawing twice cannot show the same tissue at two scales: cells and fibres use random numbers in
amounts that depend on the pixels. So a slide is drawn once. Coarser views are area means of that
drawing, as in a scanner's pyramid.

The folder has the layout of every data set (`train.data.dataset`), one slide per image.
"""

from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from train.checked import CheckedSettings, NumberOf, Positive, Seed, TissueMpp
from train.data.synthetic.dataset import write_drawings
from train.data.synthetic.tissue import Drawing, draw_tissue, lay_out_regions
from train.errors import SettingsError

_GENERATOR_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SlideSettings(CheckedSettings):
    """Settings of a folder of synthetic slides."""

    num_train: NumberOf = 56
    """Number of slides to pretrain on and to fit probes on."""
    num_validation: NumberOf = 10
    """Number of slides that select a probe's regularisation."""
    num_test: NumberOf = 30
    """Number of test slides."""
    side_um: Positive = 256.0
    """Height and width of a slide in um."""
    mpp: TissueMpp = 0.25
    """um per pixel of the drawing, the finest scale."""
    region_scale: Annotated[float, Field(ge=1, le=20)] = 3.0
    """Enlargement of the regions over those of synthetic tiles, so that a tile at 1 um per pixel
    can show one class. Cells keep their size."""
    seed: Seed = 0
    """Seed of the folder. Each slide derives its own seed from this one and its number."""

    def __post_init__(self) -> None:
        """Refuse a value out of its range, or a slide too small or too large to draw."""
        super().__post_init__()
        if not 32 <= self.side_um / self.mpp <= 8192:
            raise SettingsError(
                f"side_um is {self.side_um}, {self.side_um / self.mpp:.0f} pixels at {self.mpp} um "
                "per pixel; expected a side of 32 to 8192 pixels. Change --side-um or --mpp."
            )


def make_slide(
    rng: np.random.Generator, side_um: float, mpp: float, region_scale: float
) -> Drawing:
    """Draw one slide.

    Args:
        rng: the only source of randomness; the same state gives the same bytes.
        side_um: height and width in um.
        mpp: um per pixel.
        region_scale: enlargement of the regions over those of `make_tile`.
    """
    regions = lay_out_regions(rng, round(side_um / mpp), mpp / region_scale)
    return draw_tissue(rng, regions, mpp)


def write_slides(folder: Path, settings: SlideSettings, pool: Executor | None = None) -> None:
    """Write the whole folder, or leave it unchanged if it exists with the same settings.

    `pool` are the threads or processes that draw; four threads by default.

    Raises:
        DestinationError: the folder has other content.
    """
    draw = partial(
        make_slide,
        side_um=settings.side_um,
        mpp=settings.mpp,
        region_scale=settings.region_scale,
    )
    write_drawings(
        folder,
        draw,
        "slide_{:04d}",
        (settings.num_test, settings.num_validation, settings.num_train),
        seed=settings.seed,
        mpp=settings.mpp,
        recipe={"kind": "slides", "generator_version": _GENERATOR_VERSION, **asdict(settings)},
        pool=pool,
    )
