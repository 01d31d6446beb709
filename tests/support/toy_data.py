"""A data set in SAM-Path's layout, small enough to train on in a test: stripes of plain colours."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.support.toy_bundle import CLASSES, REFERENCE_RGB
from train.data.folder import Tile, TileFolder
from train.fitting.metrics_file import read_metrics
from train.presets import synthetic
from train.settings import AugmentationSettings, ModelSettings, OptimizationSettings, Settings

TILE_SIZE_PX = 64


def toy_settings(**changes: object) -> Settings:
    """The synthetic preset on tiles of 64 pixels, with the smallest encoders; see `changed`."""
    settings = replace(
        synthetic(),
        model=ModelSettings(
            tile_size_px=TILE_SIZE_PX,
            image_encoder="tiny",
            pathology_encoder="vit_tiny_patch16_224",
            pathology_encoder_depth=1,
            encoders_frozen=False,
            decoder_dim=32,
        ),
        optimization=OptimizationSettings(
            epochs=2, batch_size=4, learning_rate=1e-3, warmup_steps=2
        ),
        augmentation=AugmentationSettings(num_workers=0),
    )
    return changed(settings, **changes)


def changed(settings: Settings, **changes: object) -> Settings:
    """Other settings: fields by their values, or groups by a dictionary of what changes in them."""
    values = {
        name: replace(getattr(settings, name), **value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return replace(settings, **values)  # type: ignore[arg-type]


def rows_of(run: Path) -> list[dict[str, float]]:
    """The numbers of every epoch of a run."""
    rows = read_metrics(run / "metrics.csv")
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def write_toy_data(root: Path, *, num_train: int = 8, num_validation: int = 2) -> Path:
    """Write tiles whose every column of pixels has the colour of its class; 0 is unlabelled."""
    (root / "img").mkdir(parents=True)
    (root / "mask").mkdir()
    rng = np.random.default_rng(0)
    folds = [1] * num_train + [0] * num_validation + [-1] * 2
    for index, _ in enumerate(folds):
        order = rng.permutation(len(CLASSES) + 1)
        mask = np.repeat(order[np.arange(TILE_SIZE_PX) * len(order) // TILE_SIZE_PX], TILE_SIZE_PX)
        mask = mask.reshape(TILE_SIZE_PX, TILE_SIZE_PX).T.astype(np.uint8)
        colors = np.concatenate([[[255, 255, 255]], REFERENCE_RGB])[mask]
        noisy = np.clip(colors + rng.normal(0, 8, colors.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(root / "img" / f"tile{index}.png")
        Image.fromarray(mask).save(root / "mask" / f"tile{index}.png")
    with (root / "folds.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["img_id", "fold"])
        writer.writerows((f"tile{index}", fold) for index, fold in enumerate(folds))
    classes = [{"name": entry.name, "color": entry.color} for entry in CLASSES]
    (root / "dataset.json").write_text(json.dumps({"mpp": 0.5, "classes": classes}))
    return root


def write_twice_as_large(root: Path) -> None:
    """Enlarge every image and mask of the toy data twice: the same tissue at half the mpp."""
    for path in [*(root / "img").iterdir(), *(root / "mask").iterdir()]:
        with Image.open(path) as image:
            size = image.width * 2, image.height * 2
            larger = image.resize(size, Image.Resampling.NEAREST)
        larger.save(path)
    description = root / "dataset.json"
    description.write_text(description.read_text().replace('"mpp": 0.5', '"mpp": 0.25'))


def one_image(root: Path, image: NDArray[np.uint8], mpp: float | None) -> TileFolder:
    """A data set of one test image whose labels are all 1."""
    root.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(root / "image.png")
    Image.fromarray(np.ones(image.shape[:2], np.uint8)).save(root / "mask.png")
    tile = Tile("image", root / "image.png", root / "mask.png", mpp)
    return TileFolder(root, (), None, {"training": (), "validation": (), "test": (tile,)})
