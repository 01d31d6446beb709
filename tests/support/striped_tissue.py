"""Drawn tissue of one layout at any um per pixel, in images of many sizes.

Blocks of 16 um have one class each, told by their colour and by stripes that are so many um wide.
"""

import csv
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASSES = ({"name": "Narrow", "color": "#d62728"}, {"name": "Wide", "color": "#1f77b4"})
_PERIODS_UM = (3.0, 9.0)
_COLORS = np.array([[200, 90, 140], [140, 100, 200]])
_SIDES_UM = (24, 40, 64)


def draw(
    rng: np.random.Generator, height_um: float, width_um: float, mpp: float
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An image (H, W, 3) and its labels (H, W); for the same `rng`, the same tissue at any mpp."""
    y, x = ((np.arange(round(um / mpp)) + 0.5) * mpp for um in (height_um, width_um))
    blocks = rng.integers(0, 2, (-(-int(height_um) // 16), -(-int(width_um) // 16)))
    labels = blocks[(y // 16).astype(int)][:, (x // 16).astype(int)]
    narrow, wide = (np.sin(2 * np.pi * x / period)[None] for period in _PERIODS_UM)
    color = _COLORS[labels] + 25 * np.where(labels == 0, narrow, wide)[..., None]
    return np.clip(color, 0, 255).astype(np.uint8), (labels + 1).astype(np.uint8)


def write_striped_tissue(root: Path, mpp: float, *, num_train: int = 24) -> Path:
    """Write a data set of this tissue: the same images, sizes in um and folds at each mpp."""
    for folder in ("img", "mask"):
        (root / folder).mkdir(parents=True)
    rows = []
    for index in range(num_train + 8):
        rng = np.random.default_rng(index)
        height, width = rng.choice(_SIDES_UM, 2)
        image, labels = draw(rng, float(height), float(width), mpp)
        Image.fromarray(image).save(root / "img" / f"{index}.png")
        Image.fromarray(labels).save(root / "mask" / f"{index}.png")
        rows.append((index, 1 if index < num_train else 0 if index < num_train + 4 else -1))
    with (root / "folds.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("img_id", "fold"), *rows])
    (root / "dataset.json").write_text(json.dumps({"mpp": mpp, "classes": CLASSES}))
    return root
