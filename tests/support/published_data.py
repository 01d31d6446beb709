"""Published data sets as a converter finds them: small, with the published names and folders."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 32
"""Side of the test's regions, in pixels."""


def write_bcss(
    source: Path, patients: list[str], codes: np.ndarray | None = None, mpp: str = "_MPP-0.2500"
) -> None:
    """One region a patient, in the published names and folders; by default all of it tumor."""
    if codes is None:
        codes = np.ones((SIDE, SIDE), np.uint8)
    for folder in ("rgbs_colorNormalized", "masks"):
        (source / folder).mkdir(parents=True, exist_ok=True)
    for patient in patients:
        name = f"{patient}-DX1_xmin45749_ymin25055{mpp}.png"
        image = np.full((*codes.shape, 3), 200, np.uint8)
        Image.fromarray(image).save(source / "rgbs_colorNormalized" / name)
        Image.fromarray(codes).save(source / "masks" / name)


def write_crag(source: Path, num_train: int = 3, num_test: int = 1, side: int = SIDE) -> None:
    for folder, split, count in (("train", "train", num_train), ("valid", "test", num_test)):
        for kind in ("Images", "Annotation"):
            (source / folder / kind).mkdir(parents=True, exist_ok=True)
        for number in range(1, count + 1):
            glands = np.zeros((side, side), np.uint8)
            glands[: side // 4], glands[-side // 4 :] = 1, 2
            image = Image.fromarray(np.full((side, side, 3), 180, np.uint8))
            image.save(source / folder / "Images" / f"{split}_{number}.png")
            Image.fromarray(glands).save(source / folder / "Annotation" / f"{split}_{number}.png")


def folds(out: Path) -> list[dict[str, str]]:
    with (out / "folds.csv").open(newline="") as file:
        return list(csv.DictReader(file))
