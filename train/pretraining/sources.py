"""The sources of slides: a data set's folder, OCELOT's published pairs, a folder of whole slides.

`SOURCES` lists them; a new source is one entry. Each says which slides are for training.
Pretraining never sees test slides, although it reads no labels: a score on slides that the encoder
has seen means nothing.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.data.convert.images import VALIDATION_FOLD, FoldSettings, folds_of
from train.data.convert.layout import TEST_FOLD
from train.data.convert.ocelot import find_images, read_metadata
from train.data.folder import Split, Tile, read_folds, read_tile_folder
from train.data.images import image_size, read_image
from train.errors import DatasetError, ScaleError, SourceError
from train.pretraining.footprints import Footprint
from train.pretraining.regions import MAX_ENLARGEMENT, ImageRegions, RegionSource, SlideInfo
from train.pretraining.settings import ViewSettings
from train.pretraining.whole_slides import WholeSlides, find_slides, has_slides

_WINDOW = 1.33
_SPLITS: dict[int, Split] = {TEST_FOLD: "test", VALIDATION_FOLD: "validation"}


@dataclass(frozen=True)
class SplitSource:
    """A source with the numbers of its slides in each split."""

    source: RegionSource
    slides: dict[Split, tuple[int, ...]]
    name: str


@dataclass(frozen=True)
class SourceKind:
    """One kind of source."""

    expected: str
    """What it looks like on disk, for messages."""
    matches: Callable[[Path], bool]
    open: Callable[[Path], SplitSource]


class _OpenImage:
    """Reads image `i` of a list; picklable, for loader workers."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self._paths = paths

    def __call__(self, index: int) -> NDArray[np.uint8]:
        return read_image(self._paths[index])


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
    source = ImageRegions(slides, _OpenImage(tuple(paths)))
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


class OcelotRegions:
    """OCELOT's pairs: a tissue patch, and inside it a cell patch at four times the magnification.

    Each pair is one slide: fine inside its cell patch, coarse around it (Ryu et al., CVPR 2023).
    """

    def __init__(self, tissue: ImageRegions, cell: ImageRegions, slides: list[SlideInfo]) -> None:
        self._tissue, self._cell = tissue, cell
        self.slides: Sequence[SlideInfo] = slides

    def read(self, slide: int, footprint: Footprint, size_px: int) -> NDArray[np.uint8]:
        """Read a square from the cell patch where that is needed and holds it, else the tissue."""
        info = self.slides[slide]
        assert info.fine_area is not None
        assert info.outer_mpp is not None
        wanted_mpp = footprint.side_um / size_px
        if wanted_mpp >= info.outer_mpp * 0.98 or not info.fine_area.contains(footprint):
            return self._tissue.read(slide, footprint, size_px)
        inside = Footprint(
            footprint.y_um - info.fine_area.y_um,
            footprint.x_um - info.fine_area.x_um,
            footprint.side_um,
        )
        return self._cell.read(slide, inside, size_px)

    def tissue_share(self, slide: int, footprint: Footprint) -> float:
        """Share of tissue in a square, in [0, 1]."""
        return self._tissue.tissue_share(slide, footprint)


def open_ocelot(root: Path) -> SplitSource:
    """Open OCELOT's published folder, with the folds that `train prepare ocelot` draws by default.

    Raises:
        SourceError: the metadata is not as published, or there is no pair of images.
    """
    pairs = read_metadata(root / "metadata.json")
    folds = folds_of(find_images(root)[0], FoldSettings())
    slides: list[SlideInfo] = []
    tissue: list[SlideInfo] = []
    cell: list[SlideInfo] = []
    tissue_paths: list[Path] = []
    cell_paths: list[Path] = []
    splits: dict[Split, list[int]] = {"training": [], "validation": [], "test": []}
    for pair_id, pair in sorted(pairs.items()):
        paths = [
            root / "images" / pair["subset"] / kind / f"{pair_id}.jpg"
            for kind in ("tissue", "cell")
        ]
        if pair_id not in folds or not all(path.is_file() for path in paths):
            continue
        info, fine = _ocelot_slide(pair_id, pair)
        splits[_SPLITS.get(folds[pair_id], "training")].append(len(slides))
        slides.append(info)
        tissue.append(_as_image(info, info.outer_mpp or info.base_mpp, info.height_um))
        cell.append(_as_image(info, info.base_mpp, fine.side_um))
        tissue_paths.append(paths[0])
        cell_paths.append(paths[1])
    if not slides:
        raise SourceError(
            f"{root} has a metadata.json, but no pair of images; expected "
            "images/train/tissue/ID.jpg and images/train/cell/ID.jpg, as OCELOT is published"
        )
    source = OcelotRegions(
        ImageRegions(tissue, _OpenImage(tuple(tissue_paths))),
        ImageRegions(cell, _OpenImage(tuple(cell_paths))),
        slides,
    )
    return SplitSource(
        source, {split: tuple(found) for split, found in splits.items()}, root.resolve().name
    )


def _ocelot_slide(pair_id: str, pair: dict[str, dict[str, float]]) -> tuple[SlideInfo, Footprint]:
    """A pair's slide in um, its origin at the tissue patch's upper left corner."""
    tissue, cell = pair["tissue"], pair["cell"]
    um_per_px = float(pair["mpp_x"])  # type: ignore[arg-type]
    fine = Footprint(
        y_um=(cell["y_start"] - tissue["y_start"]) * um_per_px,
        x_um=(cell["x_start"] - tissue["x_start"]) * um_per_px,
        side_um=(cell["x_end"] - cell["x_start"]) * um_per_px,
    )
    side_um = (tissue["x_end"] - tissue["x_start"]) * um_per_px
    info = SlideInfo(
        name=pair_id,
        width_um=side_um,
        height_um=side_um,
        base_mpp=float(cell["resized_mpp_x"]),
        group=str(pair["slide_name"])[:12],
        fine_area=fine,
        outer_mpp=float(tissue["resized_mpp_x"]),
    )
    return info, fine


def _as_image(info: SlideInfo, mpp: float, side_um: float) -> SlideInfo:
    return SlideInfo(
        name=info.name, width_um=side_um, height_um=side_um, base_mpp=mpp, group=info.group
    )


def open_slides(root: Path) -> SplitSource:
    """Open a folder of whole slides.

    Raises:
        FocalPathError: a slide cannot be used, or folds.csv does not fit the slides.
    """
    files = find_slides(root)
    splits: dict[Split, list[int]] = {"training": [], "validation": [], "test": []}
    for number, file in enumerate(files):
        splits[_SPLITS.get(file.fold, "training")].append(number)
    return SplitSource(
        WholeSlides(files), {split: tuple(found) for split, found in splits.items()}, root.name
    )


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


def open_source(root: Path) -> SplitSource:
    """Open a folder of any kind in `SOURCES`.

    Raises:
        SourceError: the folder is of no known kind.
    """
    for kind in SOURCES:
        if kind.matches(root):
            return kind.open(root)
    expected = "; or ".join(kind.expected for kind in SOURCES)
    raise SourceError(f"{root} is not a source of slides. Expected {expected}.")


def with_folds(found: SplitSource, path: Path) -> SplitSource:
    """The same slides with the folds of another file, such as a prepared data set's folds.csv.

    Args:
        found: the source.
        path: columns img_id, a slide's name with or without its suffix, and fold.

    Raises:
        DatasetError: the file cannot be used, or leaves a slide out.
    """
    folds = {row.tile_id: row.fold for row in read_folds(path)}
    splits: dict[Split, list[int]] = {"training": [], "validation": [], "test": []}
    missing = []
    for number, info in enumerate(found.source.slides):
        fold = folds.get(info.name, folds.get(Path(info.name).stem))
        if fold is None:
            missing.append(info.name)
        else:
            splits[_SPLITS.get(fold, "training")].append(number)
    if missing:
        raise DatasetError(
            f"{path} has no line for {len(missing)} of the {len(found.source.slides)} slides of "
            f"{found.name}, such as {missing[0]}; expected all, since a slide for testing must not "
            "be learned from. Give the folds.csv that was made of these slides."
        )
    return replace(found, slides={split: tuple(numbers) for split, numbers in splits.items()})


_MIN_TISSUE = 0.001
"""Least share of tissue in some square of some slide; less is glass (our choice)."""


def usable_slides(
    found: SplitSource, slides: tuple[int, ...], views: ViewSettings
) -> tuple[int, ...]:
    """Choose the slides that are large and fine enough for the views.

    Raises:
        SourceError: none is large enough, or none shows tissue.
        ScaleError: none is as fine as the finest scale.
    """
    infos = {slide: found.source.slides[slide] for slide in slides}
    needed_um = _WINDOW * views.coarse_mpp * views.view_px
    large = [s for s, info in infos.items() if min(info.width_um, info.height_um) >= needed_um]
    if not large:
        largest = max((min(i.width_um, i.height_um) for i in infos.values()), default=0.0)
        raise SourceError(
            f"{found.name} has no slide of {needed_um:.0f} um for views of {views.view_px} pixels "
            f"at {views.coarse_mpp:g} um per pixel (the largest has {largest:.0f} um). Take "
            "smaller views (--view-px), a finer --coarse-mpp, or larger images."
        )
    limit = min(views.mpps) * MAX_ENLARGEMENT
    usable = tuple(slide for slide in large if infos[slide].base_mpp <= limit)
    if not usable:
        finest = min(infos[slide].base_mpp for slide in large)
        raise ScaleError(
            f"{found.name} is {finest:g} um per pixel at its finest, and views at "
            f"{min(views.mpps):g} are asked for; detail that was not scanned cannot be learned. "
            "Take coarser --fine-mpps or finer slides."
        )
    if not any(_shows_tissue(found.source, slide) for slide in usable):
        raise SourceError(
            f"none of the {len(usable)} slides of {found.name} shows tissue: all are as pale as "
            "glass. Expected stained sections; check that the images are those meant."
        )
    if len(usable) < len(slides):
        print(
            f"{len(slides) - len(usable)} of {len(slides)} training slides are left out: smaller "
            f"than {needed_um:.0f} um, or coarser than {limit:.3g} um per pixel",
            file=sys.stderr,
        )
    return usable


def _shows_tissue(source: RegionSource, slide: int) -> bool:
    info = source.slides[slide]
    side = min(info.height_um, info.width_um)
    length = max(info.height_um, info.width_um)
    for start in np.linspace(0, length - side, int(np.ceil(length / side))):
        top, left = (start, 0.0) if info.height_um > info.width_um else (0.0, start)
        if source.tissue_share(slide, Footprint(float(top), float(left), side)) >= _MIN_TISSUE:
            return True
    return False
