"""A data set of synthetic tissue in SAM-Path's layout.

img/ID.png      (H, W, 3) uint8 RGB
mask/ID.png     (H, W) uint8: 0 unlabelled, 1..5 as in `CLASSES`
folds.csv       img_id,fold: -1 test, 0 validation, 1 training
dataset.json    mpp, class names and colours
settings.json   the settings of the data set
"""

import json
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field
from rich.progress import track

from serve.contract.machine import usable_cpus
from train.checked import CheckedSettings, NumberOf, Seed, TissueMpp
from train.data.synthetic.tissue import CLASSES, Drawing, make_tile
from train.data.writing import save_tile, whole_dataset, write_description
from train.errors import DestinationError

__all__ = ["CLASSES", "SyntheticSettings", "make_tile", "write_dataset"]

_GENERATOR_VERSION = 1
"""Increased when the same settings start to give other tiles, so that old data is not reused."""

_TEST, _VALIDATION, _TRAINING = -1, 0, 1


@dataclass(frozen=True, kw_only=True)
class SyntheticSettings(CheckedSettings):
    """Settings of a synthetic data set."""

    num_train: NumberOf = 200
    """Number of training tiles."""
    num_validation: NumberOf = 24
    """Number of validation tiles."""
    num_test: NumberOf = 64
    """Number of test tiles."""
    tile_size_px: Annotated[int, Field(ge=32)] = 256
    """Height and width of a tile: at least 32, as fewer show no tissue."""
    mpp: TissueMpp = 0.5
    """um per pixel. 0.5 is a 20x objective, 0.25 a 40x one."""
    seed: Seed = 0
    """Seed of the data set. Each tile derives its own seed from this one and its number."""


def write_dataset(folder: Path, settings: SyntheticSettings) -> None:
    """Write the data set, or leave it unchanged if it exists with the same settings.

    The folder appears whole or not at all.

    Missing parents are created.

    Raises:
        DestinationError: the folder has other content.
    """

    def draw(rng: np.random.Generator) -> Drawing:
        return make_tile(rng, settings.tile_size_px, settings.mpp)

    write_drawings(
        folder,
        draw,
        "tile_{:05d}",
        (settings.num_test, settings.num_validation, settings.num_train),
        seed=settings.seed,
        mpp=settings.mpp,
        recipe={"generator_version": _GENERATOR_VERSION, **asdict(settings)},
    )


def _already_there(folder: Path, recipe: dict[str, object]) -> bool:
    """Return whether `folder` holds exactly this data set; refuse any other content."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    advice = "give another folder, or delete this one to create the data set again"
    try:
        found = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DestinationError(
            f"{folder} exists and is not a synthetic data set (no readable settings.json); {advice}"
        ) from None
    if found != recipe:
        raise DestinationError(
            f"{folder} was made with other settings: found {found}, expected {recipe}; {advice}"
        )
    return True


def write_drawings(
    folder: Path,
    draw: Callable[[np.random.Generator], Drawing],
    name: str,
    counts: tuple[int, int, int],
    *,
    seed: int,
    mpp: float,
    recipe: dict[str, object],
    pool: Executor | None = None,
) -> None:
    """Draw the images of a data set and write it whole, unless it is there already.

    Args:
        folder: the target.
        draw: draws an image and its labels.
        name: format of a name, which takes the image's number.
        counts: of test, validation and training images. Test images come first, so more training
            images never change them.
        seed: of the data set. An image's randomness depends on this and its own number alone.
        mpp: um per pixel of the drawings.
        recipe: the content of settings.json.
        pool: threads or processes that draw, shut down at the end; four threads by default.

    Raises:
        DestinationError: the folder has other content.
        StorageError: the disk is full, or cannot be written.
    """
    if _already_there(folder, recipe):
        return
    folds = np.repeat([_TEST, _VALIDATION, _TRAINING], counts).tolist()
    names = [name.format(number) for number in range(len(folds))]
    with whole_dataset(folder) as unfinished:
        # numpy and scipy release the GIL.
        pool = pool or ThreadPoolExecutor(min(4, usable_cpus()))
        write = partial(_write_drawing, unfinished, draw, seed)
        try:
            written = pool.map(write, range(len(names)), names)
            for _ in track(written, "Drawing synthetic tissue", total=len(names)):
                pass
        finally:
            # If an image fails or the user interrupts, pending images are dropped.
            pool.shutdown(cancel_futures=True)
        rows = zip(names, folds, strict=True)
        write_description(
            unfinished, ("img_id", "fold"), rows, mpp=mpp, classes=CLASSES, recipe=recipe
        )


def _write_drawing(
    folder: Path, draw: Callable[[np.random.Generator], Drawing], seed: int, number: int, name: str
) -> None:
    save_tile(folder, name, *draw(np.random.default_rng(np.random.SeedSequence((seed, number)))))
