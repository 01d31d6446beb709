"""The tiles that every artefact is compared on: a data set's held-out tiles, or drawn tissue."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from export.errors import InputError, SettingsError, errors_translated
from train.data.dataset import WholeImageDataset
from train.data.folder import Split, TileFolder, read_tile_folder
from train.data.images import read_image
from train.data.scale import TileScale, cut_image, resolve_mpp, seen_at
from train.data.synthetic.tissue import CLASSES, make_tile

Images = NDArray[np.uint8]
_DRAWN_MPP = 0.5
"""um per pixel of drawn tissue where the model does not say its own."""


@dataclass(frozen=True, kw_only=True)
class ValidationTiles:
    """Tiles of the model's size and um per pixel.

    images: (N, H, W, 3) uint8, RGB. masks: (N, H, W) uint8, 0 unlabelled and 1..C the classes, or
    None where nothing says what is right.
    """

    source: str
    """What the tiles are, for the reader of a report."""
    names: tuple[str, ...]
    images: Images
    masks: Images | None
    from_scale: Callable[[float, int], Images] | None = None
    """Of a factor and a number: the first so many tiles as serving cuts them from images whose um
    per pixel is the factor times the model's. None where an um per pixel is not known."""
    own_factor: float = 1.0
    """The images' own um per pixel over the model's, of the coarsest one."""

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
    squeeze: bool = False,
) -> ValidationTiles:
    """Tiles of a data set as the evaluation sees them, or else drawn tissue.

    A data set's held-out tiles come first: test, then validation, then training. Each class is on
    one of them, where the data has it and the tiles are enough, the rarest first.

    Args:
        data: a data set in SAM-Path's layout, or None.
        tile_size_px: the model's tile size.
        num_tiles: how many tiles at most.
        class_names: the model's classes; None leaves masks out.
        mpp: um per pixel at which the model sees tissue; None takes images as they are.
        squeeze: resize every image to one tile, as a checkpoint of version 0.1 does.

    Raises:
        InputError: the data set has no tiles, other classes than the model, or no um per pixel.
    """
    if num_tiles < 1:
        raise SettingsError(f"{num_tiles} tiles to compare on; expected at least 1")
    if data is None:
        return _drawn_tiles(tile_size_px, num_tiles, class_names, mpp, squeeze=squeeze)
    folder = read_tile_folder(data)
    found = [entry.name for entry in folder.classes]
    if class_names is not None and found != list(class_names):
        raise InputError(
            f"{data} has the classes {', '.join(found)}; the model has {', '.join(class_names)}. "
            "Give a data set with the model's classes, in their order, to --validate."
        )
    if not any(folder.tiles.values()):
        raise InputError(f"{data} has no tile to compare on; expected lines in folds.csv")
    if mpp is not None and not squeeze:
        resolve_mpp(mpp, folder.mpp, [tile for split in folder.tiles.values() for tile in split])
    scale = TileScale(tile_size_px=tile_size_px, mpp=mpp, squeeze=squeeze)
    return _tiles_of(folder, scale, num_tiles, with_masks=class_names is not None)


def _tiles_of(
    folder: TileFolder, scale: TileScale, num_tiles: int, *, with_masks: bool
) -> ValidationTiles:
    splits = _Splits(folder, scale)
    ordered = _choose(splits, num_tiles)
    counts = {at.split: sum(other.split == at.split for other in ordered) for at in ordered}
    listing = ", ".join(f"{count} {split}" for split, count in counts.items())
    return ValidationTiles(
        source=f"{listing} tiles of {folder.root.name}",
        names=tuple(splits.name(at) for at in ordered),
        images=np.stack([splits.image(at) for at in ordered]),
        masks=np.stack([splits.mask(at) for at in ordered]) if with_masks else None,
        from_scale=None
        if scale.mpp is None or scale.squeeze
        else lambda factor, count: np.stack(
            [splits.image_from_scale(at, factor) for at in ordered[:count]]
        ),
        own_factor=splits.own_factor(ordered),
    )


class _Place(NamedTuple):
    """A tile of an image of a split."""

    split: Split
    image: int
    number: int


class _Splits:
    """The images of each split, cut as the evaluation cuts them."""

    def __init__(self, folder: TileFolder, scale: TileScale) -> None:
        self.num_classes = len(folder.classes)
        self._images = {
            split: WholeImageDataset(tiles, self.num_classes, scale)
            for split, tiles in folder.tiles.items()
        }

    def name(self, at: _Place) -> str:
        """The image's name, with the tile's (y, x) where there are several."""
        images = self._images[at.split]
        places = images.placements[at.image].places
        name = images.tiles[at.image].tile_id
        return name if len(places) == 1 else "{}_{}_{}".format(name, *places[at.number])

    def image(self, at: _Place) -> Images:
        """A tile's pixels, (T, T, 3) uint8."""
        tile = self._images[at.split].fixed_tiles(at.image)[at.number]
        return np.asarray(tile.permute(1, 2, 0).numpy())

    def image_from_scale(self, at: _Place, factor: float) -> Images:
        """The same pixels as they are cut from a source of `factor` times the model's scale."""
        images = self._images[at.split]
        tile, scale = images.tiles[at.image], images.scale
        assert tile.pixel_size is not None, "checked with resolve_mpp"
        assert scale.mpp is not None, "asked for only where it is known"
        seen = seen_at(read_image(tile.image), tile.pixel_size, scale.mpp * factor)
        return np.asarray(cut_image(seen, images.placements[at.image], scale)[at.number], np.uint8)

    def own_factor(self, places: Sequence[_Place]) -> float:
        """The coarsest image's um per pixel over the model's; 1 where they are not known."""
        images = [(self._images[at.split], at.image) for at in places]
        return max(max(of.scale.factor(of.tiles[index].pixel_size)) for of, index in images)

    def mask(self, at: _Place) -> Images:
        """A tile's labels, (T, T) uint8."""
        labels = self._images[at.split].labels(at.image)["tile_labels"]
        return np.asarray(labels[at.number].numpy())

    def count_classes(self, split: Split) -> tuple[list[_Place], NDArray[np.int64]]:
        """All tiles of a split, and the (tiles, C) pixels of each class on them."""
        images = self._images[split]

        def count(index: int) -> NDArray[np.int64]:
            tiles = images.labels(index)["tile_labels"].flatten(1).numpy()
            length = 1 + self.num_classes
            return np.stack([np.bincount(tile, minlength=length)[1:] for tile in tiles])

        with ThreadPoolExecutor() as pool:
            counts = track(
                pool.map(count, range(len(images))),
                f"classes of the {split} tiles",
                total=len(images),
                console=Console(stderr=True),
                transient=True,
            )
            found = list(counts)
        places = [
            _Place(split, index, number)
            for index, of_image in enumerate(found)
            for number in range(len(of_image))
        ]
        empty = np.zeros((0, self.num_classes), np.int64)
        return places, np.concatenate([empty, *found])


def _choose(splits: _Splits, num_tiles: int) -> list[_Place]:
    """The first tiles, but with the tile that has most of each class that would be missing."""
    order: tuple[Split, ...] = ("test", "validation", "training")
    ordered: list[_Place] = []
    pixels = np.zeros((0, splits.num_classes), np.int64)
    for split in order:  # the masks of a later split are read only where it takes them
        places, counts = splits.count_classes(split)
        ordered += places
        pixels = np.concatenate([pixels, counts])
        if len(ordered) >= num_tiles and pixels.any(axis=0).all():
            break
    chosen: set[int] = set()
    for label in np.argsort(pixels.sum(axis=0), kind="stable"):
        having = np.flatnonzero(pixels[:, label]).tolist()
        if having and len(chosen) < num_tiles and chosen.isdisjoint(having):
            ranks = {t: (-order.index(ordered[t].split), pixels[t, label]) for t in having}
            chosen.add(max(ranks, key=ranks.__getitem__))
    others = (index for index in range(len(ordered)) if index not in chosen)
    chosen.update(list(others)[: num_tiles - len(chosen)])
    return [ordered[index] for index in sorted(chosen)]


def _drawn_tiles(
    tile_size_px: int,
    num_tiles: int,
    class_names: Sequence[str] | None,
    mpp: float | None,
    *,
    squeeze: bool,
) -> ValidationTiles:
    rng = np.random.default_rng(0)
    drawn_mpp = mpp or _DRAWN_MPP
    pairs = [make_tile(rng, tile_size_px, drawn_mpp) for _ in range(num_tiles)]
    same_classes = list(class_names or ()) == [entry.name for entry in CLASSES]
    images = np.stack([image for image, _ in pairs])
    scale = TileScale(tile_size_px=tile_size_px, mpp=drawn_mpp)
    place = scale.place(tile_size_px, tile_size_px, drawn_mpp)

    def from_scale(factor: float, count: int) -> Images:
        seen = [seen_at(image, drawn_mpp, drawn_mpp * factor) for image in images[:count]]
        return np.concatenate([cut_image(image, place, scale) for image in seen]).astype(np.uint8)

    return ValidationTiles(
        source=f"{num_tiles} tiles of drawn tissue",
        names=tuple(f"drawn_{index}" for index in range(num_tiles)),
        images=images,
        masks=np.stack([labels for _, labels in pairs]) if same_classes else None,
        from_scale=None if mpp is None or squeeze else from_scale,
    )
