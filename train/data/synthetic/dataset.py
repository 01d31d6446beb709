"""A data set of synthetic tissue in SAM-Path's layout.

img/ID.png      (H, W, 3) uint8 RGB
mask/ID.png     (H, W) uint8: 0 unlabelled, 1..5 as in `CLASSES`
folds.csv       img_id,fold: -1 test, 0 validation, 1 training
dataset.json    mpp, class names and colours
settings.json   the settings of the data set
"""

import csv
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import Field
from rich.progress import track

from train.data.folder import whole_or_not_at_all, write_json
from train.data.synthetic.tissue import CLASSES, make_tile
from train.errors import DestinationError
from train.settings import CheckedSettings, NumberOf, Seed, TissueMpp

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

    Args:
        folder: the target; missing parents are created.
        settings: what to draw.

    Raises:
        FocalPathError: the folder has other content.
    """
    recipe = {"generator_version": _GENERATOR_VERSION, **asdict(settings)}
    if already_there(folder, recipe):
        return
    with whole_or_not_at_all(folder) as partial:
        folds = _folds(settings)
        _write_tiles(partial, settings, list(folds))
        with (partial / "folds.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["img_id", "fold"])
            rows.writerows(folds.items())
        classes = [{"name": name, "color": color} for name, color in CLASSES]
        write_json(partial / "dataset.json", {"mpp": settings.mpp, "classes": classes})
        write_json(partial / "settings.json", recipe)


def already_there(folder: Path, recipe: dict[str, object]) -> bool:
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


def _folds(settings: SyntheticSettings) -> dict[str, int]:
    """Map tile IDs to folds. Test tiles come first, so adding training tiles never changes them."""
    folds = (
        [_TEST] * settings.num_test
        + [_VALIDATION] * settings.num_validation
        + [_TRAINING] * settings.num_train
    )
    return {f"tile_{index:05d}": fold for index, fold in enumerate(folds)}


def _write_tiles(folder: Path, settings: SyntheticSettings, names: list[str]) -> None:
    """Draw and save the tiles in up to four threads; numpy and scipy release the GIL."""
    for kind in ("img", "mask"):
        (folder / kind).mkdir()

    def write(index: int) -> None:
        # A tile's randomness depends only on its own number, not on the number of tiles.
        rng = np.random.default_rng(np.random.SeedSequence((settings.seed, index)))
        image, labels = make_tile(rng, settings.tile_size_px, settings.mpp)
        Image.fromarray(image).save(folder / "img" / f"{names[index]}.png", compress_level=3)
        Image.fromarray(labels).save(folder / "mask" / f"{names[index]}.png")

    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    try:
        tiles = pool.map(write, range(len(names)))
        for _ in track(tiles, "Drawing synthetic tissue", total=len(names)):
            pass
    finally:
        # If a tile fails or the user interrupts, pending tiles are dropped.
        pool.shutdown(cancel_futures=True)
