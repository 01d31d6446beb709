"""A comparison with made-up confusion matrices, so that its report can be tested untrained."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.support.toy_data import toy_settings
from train.comparison.compare import Comparison
from train.comparison.methods import RowName, all_rows
from train.comparison.run import RowResult
from train.data.folder import Tile, TileFolder
from train.model.checkpoint import CheckpointCard
from train.settings import LabelClass, Settings

CLASSES = tuple(
    LabelClass(name=name, color=color)
    for name, color in (
        ("Tumor", "#d55e00"),
        ("Stroma", "#009e73"),
        ("Inflammatory", "#f0e442"),
        ("Necrosis", "#0072b2"),
        ("Other", "#56b4e9"),
    )
)
NUM_TILES = 12
PIXELS = 1000


def confusion(accuracy: float, num_classes: int = len(CLASSES)) -> NDArray[np.int64]:
    """(N, C, C): that share of each class's pixels is right, a little more on every next tile.

    The errors go to the next class, and classes are the harder the later they come.
    """
    tiles = np.zeros((NUM_TILES, num_classes, num_classes), np.int64)
    for tile in range(NUM_TILES):
        for target in range(num_classes):
            wrong = round(PIXELS * (1 - accuracy + 0.002 * tile) * (1 + 0.2 * target))
            tiles[tile, target, target] = PIXELS - wrong
            tiles[tile, target, (target + 1) % num_classes] = wrong
    return tiles


def toy_comparison(
    accuracies: Mapping[RowName, Sequence[float]],
    *,
    settings: Settings | None = None,
    classes: tuple[LabelClass, ...] = CLASSES,
    minutes: Mapping[RowName, float] | None = None,
    device: str = "CPU",
) -> Comparison:
    """A comparison of the rows that `accuracies` names, each with its accuracy of every seed."""
    settings = settings or toy_settings()
    card = CheckpointCard(
        settings=settings,
        classes=classes,
        mpp=0.5,
        pixel_frequencies=tuple(0.5 ** (i + 1) for i in range(len(classes))),
        class_attention_bias=tuple(0.1 * i * i for i in range(len(classes))),
    )
    num_seeds = len(next(iter(accuracies.values())))
    tiles = tuple(Tile(f"tile{i}", Path(), Path()) for i in range(NUM_TILES))
    return Comparison(
        settings=settings,
        data=TileFolder(Path(), classes, 0.5, {"training": (), "validation": (), "test": tiles}),
        fingerprint="0123456789abcdef" * 4,
        rows=tuple(row for name, row in all_rows().items() if name in accuracies),
        seeds=tuple(range(num_seeds)),
        results={
            (name, seed): RowResult(
                card=card,
                confusion=confusion(accuracy, len(classes)),
                train_seconds=60 * (minutes or {}).get(name, 1.0),
                cpu_seconds=90 * (minutes or {}).get(name, 1.0),
                device=device,
                panels=Path(),
            )
            for name, values in accuracies.items()
            for seed, accuracy in enumerate(values)
        },
        panels=(),
    )


def with_panels(comparison: Comparison, data: Path, folder: Path) -> Comparison:
    """The comparison with a tile of a toy data set to show; its mask stands for predictions."""
    tile = Tile("tile0", data / "img" / "tile0.png", data / "mask" / "tile0.png")
    folder.mkdir()
    with Image.open(tile.mask) as mask:
        mask.save(folder / "tile0.png")
    results = {key: replace(result, panels=folder) for key, result in comparison.results.items()}
    return replace(comparison, panels=(tile,), results=results)
