"""A data set of synthetic tissue in SAM-Path's layout.

img/ID.png      (H, W, 3) uint8 RGB
mask/ID.png     (H, W) uint8: 0 unlabelled, 1..5 as in `CLASSES`
folds.csv       img_id,fold: -1 test, 0 validation, 1 training
dataset.json    mpp, class names and colours
settings.json   what the data set was made with
"""

import csv
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from train.data.folder import whole_or_not_at_all, write_json
from train.data.synthetic.tissue import CLASSES, make_tile
from train.errors import FocalPathError

__all__ = ["CLASSES", "SyntheticSettings", "make_tile", "write_dataset"]

_GENERATOR_VERSION = 1
"""Raised whenever the same settings give other tiles, so that old data sets are not reused."""

_TEST, _VALIDATION, _TRAINING = -1, 0, 1


@dataclass(frozen=True, kw_only=True)
class SyntheticSettings:
    """What a synthetic data set is made of."""

    num_train: int = 200
    """Tiles to train on."""
    num_validation: int = 24
    """Tiles to watch while training."""
    num_test: int = 64
    """Tiles held out for the final figures."""
    tile_size_px: int = 256
    """Height and width of a tile."""
    mpp: float = 0.5
    """um per pixel: 0.5 is a 20x objective, 0.25 a 40x one."""
    seed: int = 0
    """Seed of the data set; every tile has its own, derived from this and its number."""

    def __post_init__(self) -> None:
        """Refuse what cannot be made."""
        for name in ("num_train", "num_validation", "num_test", "seed"):
            if getattr(self, name) < 0:
                raise FocalPathError(f"{name} is {getattr(self, name)}; give 0 or more")
        if self.tile_size_px < 32:
            raise FocalPathError(
                f"tile_size_px is {self.tile_size_px}; give 32 or more: less shows no tissue"
            )
        if not 0.1 <= self.mpp <= 2:
            raise FocalPathError(
                f"mpp is {self.mpp} um per pixel; give 0.1 to 2, where nuclei can be seen"
            )


def write_dataset(folder: Path, settings: SyntheticSettings) -> None:
    """Write the data set, or leave it as it is where it was made before.

    The folder appears whole or not at all.

    Args:
        folder: where to; its parents are made.
        settings: what to make.

    Raises:
        FocalPathError: the folder holds something else.
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
    """Tell whether `folder` is this very data set; refuse to touch any other content."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    advice = "give another folder, or delete this one to make the data set anew"
    try:
        found = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise FocalPathError(
            f"{folder} exists and is not a synthetic data set (no readable settings.json); {advice}"
        ) from None
    if found != recipe:
        raise FocalPathError(
            f"{folder} was made with other settings: found {found}, expected {recipe}; {advice}"
        )
    return True


def _folds(settings: SyntheticSettings) -> dict[str, int]:
    """Give every tile's ID its fold; test tiles come first, so more training leaves them alone."""
    folds = (
        [_TEST] * settings.num_test
        + [_VALIDATION] * settings.num_validation
        + [_TRAINING] * settings.num_train
    )
    return {f"tile_{index:05d}": fold for index, fold in enumerate(folds)}


def _write_tiles(folder: Path, settings: SyntheticSettings, names: list[str]) -> None:
    """Draw and save every tile: two at a time, as numpy and scipy let go of the interpreter."""
    for kind in ("img", "mask"):
        (folder / kind).mkdir()

    def write(index: int) -> None:
        # A tile's chance depends on its own number only, not on how many others there are.
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
        # Tiles not yet begun are dropped when one fails or the user interrupts.
        pool.shutdown(cancel_futures=True)
