"""The sources of slides: a data set's folder, OCELOT's published pairs, a folder of whole slides.

`SOURCES` lists them; a new source is one entry. Each says which slides are for training.
Pretraining never sees test slides, although it reads no labels: a score on slides that the encoder
has seen means nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from train.data.folder import Split, Tile, read_tile_folder
from train.data.images import image_size
from train.errors import ScaleError, SourceError
from train.pretraining.ocelot_pairs import open_ocelot
from train.pretraining.regions import ImageRegions, SlideInfo
from train.pretraining.split_source import OpenImage, SplitSource, split_by_fold, with_folds
from train.pretraining.whole_slides import WholeSlides, find_slides, has_slides


@dataclass(frozen=True)
class SourceKind:
    """One kind of source."""

    expected: str
    """What it looks like on disk, for messages."""
    matches: Callable[[Path], bool]
    open: Callable[[Path], SplitSource]


def open_folder(root: Path) -> SplitSource:
    """Open a data set's folder; its masks are not read.

    Raises:
        DatasetError: it is not a data set.
        ScaleError: an image has no um per pixel, or pixels that are not squares.
    """
    folder = read_tile_folder(root)
    slides: list[SlideInfo] = []
    paths: list[Path] = []
    splits: dict[Split, tuple[int, ...]] = {}
    for split, tiles in folder.tiles.items():
        splits[split] = tuple(range(len(paths), len(paths) + len(tiles)))
        slides += [_slide_of(tile, root) for tile in tiles]
        paths += [tile.image for tile in tiles]
    source = ImageRegions(slides, OpenImage(tuple(paths)))
    return SplitSource(source, splits, root.resolve().name)


def _slide_of(tile: Tile, root: Path) -> SlideInfo:
    if tile.mpp is None:
        raise ScaleError(
            f'{root}/dataset.json has no mpp; expected um per pixel, such as "mpp": 0.25, or a '
            "column mpp in folds.csv. Views are cut by their size in um."
        )
    if tile.sides is not None:
        raise ScaleError(
            f"{tile.image} has pixels of {tile.sides} um, which are not squares; views are cut "
            "from square pixels. Resample the image to one um per pixel."
        )
    height, width = image_size(tile.image)
    return SlideInfo(
        name=tile.tile_id,
        width_um=width * tile.mpp,
        height_um=height * tile.mpp,
        base_mpp=tile.mpp,
        group=tile.group or tile.tile_id,
    )


def open_slides(root: Path) -> SplitSource:
    """Open a folder of whole slides.

    Raises:
        FocalPathError: a slide cannot be used, or folds.csv does not fit the slides.
    """
    files = find_slides(root)
    return SplitSource(WholeSlides(files), split_by_fold(file.fold for file in files), root.name)


SOURCES: tuple[SourceKind, ...] = (
    SourceKind(
        expected="a data set: img/, folds.csv and dataset.json with mpp",
        matches=lambda root: (root / "dataset.json").is_file(),
        open=open_folder,
    ),
    SourceKind(
        expected="OCELOT as it is published: images/, annotations/ and metadata.json",
        matches=lambda root: (root / "metadata.json").is_file(),
        open=open_ocelot,
    ),
    SourceKind(
        expected="a folder of whole slides, such as .svs or pyramidal .tiff",
        matches=has_slides,
        open=open_slides,
    ),
)


def open_source(root: Path, folds: Path | None = None) -> SplitSource:
    """Open a folder of any kind in `SOURCES`.

    Args:
        root: the folder.
        folds: a folds.csv that counts in place of the source's own (see `with_folds`).

    Raises:
        SourceError: the folder is of no known kind.
        DatasetError: `folds` cannot be used, or leaves a slide out.
    """
    for kind in SOURCES:
        if kind.matches(root):
            found = kind.open(root)
            return found if folds is None else with_folds(found, folds)
    expected = "; or ".join(kind.expected for kind in SOURCES)
    raise SourceError(f"{root} is not a source of slides. Expected {expected}.")
