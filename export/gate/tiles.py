"""The tiles that every artefact is compared on: a data set's held-out tiles, or drawn tissue."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from export.errors import InputError, SettingsError, errors_translated
from train.data.dataset import TileDataset
from train.data.folder import Split, Tile, TileFolder, read_tile_folder
from train.data.pixels import read_mask
from train.data.synthetic.tissue import CLASSES, make_tile

Images = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class ValidationTiles:
    """Tiles of the model's size.

    images: (N, H, W, 3) uint8, RGB. masks: (N, H, W) uint8, 0 unlabelled and 1..C the classes, or
    None where nothing says what is right.
    """

    source: str
    """What the tiles are, for the reader of a report."""
    names: tuple[str, ...]
    images: Images
    masks: Images | None

    def __len__(self) -> int:
        return len(self.names)


@errors_translated()
def validation_tiles(
    data: Path | None,
    tile_size_px: int,
    num_tiles: int,
    *,
    class_names: Sequence[str] | None = None,
    mpp: float | None = None,
) -> ValidationTiles:
    """Tiles of a data set as the evaluation sees them, or else drawn tissue.

    A data set's held-out tiles come first: test, then validation, then training. Each class is on
    one of them, where the data has it and the tiles are enough, the rarest first.

    Args:
        data: a data set in SAM-Path's layout, or None.
        tile_size_px: the model's tile size.
        num_tiles: how many tiles at most.
        class_names: the model's classes; None leaves masks out.
        mpp: um per pixel of drawn tissue.

    Raises:
        InputError: the data set has no tiles, or other classes than the model.
    """
    if num_tiles < 1:
        raise SettingsError(f"{num_tiles} tiles to compare on; expected at least 1")
    if data is None:
        return _drawn_tiles(tile_size_px, num_tiles, class_names, mpp or 0.5)
    folder = read_tile_folder(data)
    found = [entry.name for entry in folder.classes]
    if class_names is not None and found != list(class_names):
        raise InputError(
            f"{data} has the classes {', '.join(found)}; the model has {', '.join(class_names)}. "
            "Give a data set with the model's classes, in their order, to --validate."
        )
    if not any(folder.tiles.values()):
        raise InputError(f"{data} has no tile to compare on; expected lines in folds.csv")
    return _tiles_of(folder, tile_size_px, num_tiles, with_masks=class_names is not None)


def _tiles_of(
    folder: TileFolder, tile_size_px: int, num_tiles: int, *, with_masks: bool
) -> ValidationTiles:
    ordered = _choose(folder, num_tiles)
    dataset = TileDataset([tile for _, tile in ordered], len(folder.classes), tile_size_px)
    samples = [dataset[index] for index in range(len(dataset))]
    counts = {split: sum(s == split for s, _ in ordered) for split, _ in ordered}
    listing = ", ".join(f"{count} {split}" for split, count in counts.items())
    return ValidationTiles(
        source=f"{listing} tiles of {folder.root.name}",
        names=tuple(sample["tile_id"] for sample in samples),
        images=np.stack([sample["image"].permute(1, 2, 0).numpy() for sample in samples]),
        masks=np.stack([sample["labels"].numpy().astype(np.uint8) for sample in samples])
        if with_masks
        else None,
    )


def _choose(folder: TileFolder, num_tiles: int) -> list[tuple[Split, Tile]]:
    """The first tiles, but with the tile that has most of each class that would be missing."""
    order: tuple[Split, ...] = ("test", "validation", "training")
    ordered: list[tuple[Split, Tile]] = []
    pixels = np.zeros((0, len(folder.classes)), np.int64)
    for split in order:  # the masks of a later split are read only where it takes them
        ordered += [(split, tile) for tile in folder.tiles[split]]
        pixels = np.concatenate([pixels, _count_classes(folder, split)])
        if len(ordered) >= num_tiles and pixels.any(axis=0).all():
            break
    chosen: set[int] = set()
    for label in np.argsort(pixels.sum(axis=0), kind="stable"):
        having = np.flatnonzero(pixels[:, label]).tolist()
        if having and len(chosen) < num_tiles and chosen.isdisjoint(having):
            chosen.add(
                max(having, key=lambda tile: (-order.index(ordered[tile][0]), pixels[tile, label]))
            )
    others = (index for index in range(len(ordered)) if index not in chosen)
    chosen.update(list(others)[: num_tiles - len(chosen)])
    return [ordered[index] for index in sorted(chosen)]


def _count_classes(folder: TileFolder, split: Split) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(tiles, C) pixels of each class on each tile of a split."""
    tiles, num_classes = folder.tiles[split], len(folder.classes)

    def count(tile: Tile) -> np.ndarray[Any, np.dtype[np.int64]]:
        mask = read_mask(tile.mask, num_classes)
        return np.bincount(mask.ravel(), minlength=1 + num_classes)[1:]

    with ThreadPoolExecutor() as pool:
        counts = track(
            pool.map(count, tiles),
            f"classes of the {split} tiles",
            total=len(tiles),
            console=Console(stderr=True),
            transient=True,
        )
        return np.array(list(counts), np.int64).reshape(len(tiles), num_classes)


def _drawn_tiles(
    tile_size_px: int, num_tiles: int, class_names: Sequence[str] | None, mpp: float
) -> ValidationTiles:
    rng = np.random.default_rng(0)
    pairs = [make_tile(rng, tile_size_px, mpp) for _ in range(num_tiles)]
    same_classes = class_names is not None and list(class_names) == [name for name, _ in CLASSES]
    return ValidationTiles(
        source=f"{num_tiles} tiles of drawn tissue",
        names=tuple(f"drawn_{index}" for index in range(num_tiles)),
        images=np.stack([image for image, _ in pairs]),
        masks=np.stack([labels for _, labels in pairs]) if same_classes else None,
    )
