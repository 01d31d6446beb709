"""Writes a data set in SAM-Path's layout, whole or not at all; see `train.data.folder`."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from train.files import refuse_existing, whole_folder
from train.settings import LabelClass


@contextmanager
def whole_dataset(folder: Path) -> Iterator[Path]:
    """Give a new folder with img/ and mask/ to fill. It becomes `folder` at the end.

    Raises:
        DestinationError: `folder` holds something.
        StorageError: the disk is full or cannot be written.
    """
    refuse_existing(folder)
    with whole_folder(folder) as partial:
        for kind in ("img", "mask"):
            (partial / kind).mkdir()
        yield partial


def save_tile(folder: Path, name: str, image: NDArray[np.uint8], labels: NDArray[np.uint8]) -> None:
    """Write an image (H, W, 3) uint8 and its labels (H, W) uint8 as PNG."""
    Image.fromarray(image).save(folder / "img" / f"{name}.png", compress_level=3)
    Image.fromarray(labels).save(folder / "mask" / f"{name}.png")


def write_description(
    folder: Path,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    mpp: float,
    classes: Sequence[LabelClass],
    recipe: Mapping[str, Any],
) -> None:
    """Write folds.csv, dataset.json and settings.json of a new data set.

    Args:
        folder: the data set.
        columns: of folds.csv: img_id and fold, optionally group and mpp.
        rows: of folds.csv, one per image.
        mpp: um per pixel of images for which folds.csv gives none.
        classes: names and colours of labels 1..C.
        recipe: the content of settings.json: how the data set was made.
    """
    with (folder / "folds.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    description = {"mpp": mpp, "classes": [asdict(entry) for entry in classes]}
    for name, content in (("dataset.json", description), ("settings.json", recipe)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
