"""Cuts region images and label maps into a data set in SAM-Path's layout.

`train.data.folder` describes the layout. Beside `img_id` and `fold`, folds.csv has a column
`group`: the tile's patient or slide. All tiles of a group share a fold. `settings.json` records the
settings.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from rich.progress import track

from train.checked import CheckedSettings, Count, Mpp, NumFolds, Seed
from train.data.convert.source_files import (
    read_region_picture,
    refuse_other_size,
    refuse_turned,
)
from train.data.writing import save_tile, whole_dataset, write_description
from train.errors import MaskError, SourceError
from train.settings import LabelClass

TEST_FOLD = -1


@dataclass(frozen=True, kw_only=True)
class TileSettings(CheckedSettings):
    """How to cut regions into tiles and assign tiles to folds."""

    tile_size_px: Count = 1024
    """Height and width of a tile. A larger region is cut into the fewest evenly spaced tiles that
    cover it; they may overlap. A smaller region is padded with white, unlabelled pixels."""
    mpp: Mpp = 0.25
    """um per pixel of the tiles. Regions at another resolution are resampled. The paper gives 0.25
    for BCSS; for BDSA, 0.25 is our choice."""
    min_labelled_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Keep only tiles whose labelled share is above this. 0 drops tiles without labels."""
    num_folds: NumFolds = 5
    """Number of folds of the tiles outside the test set: fold 0 validation, the rest training."""
    seed: Seed = 0
    """Seed of the assignment of patients, slides or images to folds."""


@dataclass(frozen=True, eq=False)
class Region:
    """An uncut image with its label map, at the tiles' resolution.

    image: (H, W, 3) uint8 RGB; labels: (H, W) uint8, 0 unlabelled, 1..C the classes;
    group: patient or slide; fold: None to draw one.
    """

    name: str
    group: str
    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    fold: int | None = None


def read_region(
    name: str,
    group: str,
    image_path: Path,
    mask_path: Path,
    read_labels: Callable[[Path], NDArray[np.uint8]],
    scale: float,
    *,
    is_test: bool,
) -> Region:
    """Read a published image and its mask, and resample both by `scale`.

    Raises:
        FocalPathError: a file cannot be read, they differ in size, or the image is turned by its
            EXIF orientation: then nothing says which way the mask is up.
    """
    picture, labels = read_region_picture(image_path), read_labels(mask_path)
    refuse_turned(image_path, picture)
    refuse_other_size(image_path, picture.pixels, labels)
    return Region(
        name,
        group,
        resample_image(picture.pixels, scale),
        resample_labels(labels, scale),
        TEST_FOLD if is_test else None,
    )


def write_dataset(
    out: Path,
    regions: Iterable[Region],
    num_regions: int,
    classes: Sequence[LabelClass],
    settings: TileSettings,
    recipe: Mapping[str, Any],
) -> list[str]:
    """Cut the regions, one in memory at a time, and write the data set whole or not at all.

    Args:
        out: the target folder, which must not hold anything.
        regions: the regions, read lazily.
        num_regions: number of regions, for the progress bar.
        classes: names and colours of labels 1..C.
        settings: tile size and folds.
        recipe: the content of settings.json.

    Returns:
        Warnings about tiles that were left out.

    Raises:
        FocalPathError: no tile is left, or fewer than two groups are.
    """
    tiles: list[tuple[str, str, int | None]] = []
    num_left_out = 0
    with whole_dataset(out) as partial, ThreadPoolExecutor(4) as pool:
        for region in track(regions, "Cutting tiles", total=num_regions):
            kept, left_out = _write_tiles(partial, region, settings, pool)
            tiles += [(tile_id, region.group, region.fold) for tile_id in kept]
            num_left_out += left_out
        names = Counter(tile_id for tile_id, _, _ in tiles)
        if twice := [name for name, count in names.items() if count > 1]:
            raise SourceError(
                f"{len(twice)} tiles of different images would have the same name, such as "
                f"{twice[0]}: tiles are named after their image and their place in it. Rename one "
                "of the images."
            )
        if not tiles:
            raise MaskError(
                f"none of the {num_left_out} tiles has a labelled share above "
                f"{settings.min_labelled_share}; expected labelled pixels in the masks. Check the "
                "masks, or lower min_labelled_share."
            )
        write_description(
            partial,
            ("img_id", "fold", "group"),
            _fold_rows(tiles, settings),
            mpp=settings.mpp,
            classes=classes,
            recipe=recipe,
        )
    if not num_left_out:
        return []
    return [
        f"{num_left_out} of {num_left_out + len(tiles)} tiles were left out: their labelled share "
        f"is not above {settings.min_labelled_share}"
    ]


def _write_tiles(
    folder: Path, region: Region, settings: TileSettings, pool: ThreadPoolExecutor
) -> tuple[list[str], int]:
    """Write a region's tiles; return the IDs of the kept tiles and the number left out."""

    def write(tile: tuple[str, NDArray[np.uint8], NDArray[np.uint8]]) -> str | None:
        tile_id, image, labels = tile
        if np.count_nonzero(labels) <= settings.min_labelled_share * labels.size:
            return None
        save_tile(folder, tile_id, image, labels)
        return tile_id

    written = list(pool.map(write, _cut(region, settings.tile_size_px)))
    kept = [tile_id for tile_id in written if tile_id is not None]
    return kept, len(written) - len(kept)


def _cut(region: Region, size: int) -> Iterator[tuple[str, NDArray[np.uint8], NDArray[np.uint8]]]:
    """Cut a region. IDs end with the tile's first row and column, as in SAM-Path."""
    height, width = region.labels.shape
    image, labels = region.image, region.labels
    if height < size or width < size:
        padding = ((0, max(0, size - height)), (0, max(0, size - width)))
        image = np.pad(image, (*padding, (0, 0)), constant_values=255)
        labels = np.pad(labels, padding)
    rows, columns = tile_starts(height, size), tile_starts(width, size)
    for row in rows:
        for column in columns:
            tile_id = f"{region.name}_{row}_{column}"
            if len(rows) == len(columns) == 1:
                tile_id = region.name
            tile = np.s_[row : row + size, column : column + size]
            yield tile_id, image[tile], labels[tile]


def tile_starts(length_px: int, tile_size_px: int) -> list[int]:
    """Place the fewest tiles that cover a length, the first at its start, the last at its end.

    Steps differ by at most one pixel; the longer ones come first. The result matches SAM-Path's
    list of BCSS tiles (arXiv 2307.09570, dataset_cfg/BCSS_cv.csv in its repository).
    """
    num_tiles = -(-length_px // tile_size_px)
    if num_tiles <= 1:
        return [0]
    step, num_longer = divmod(length_px - tile_size_px, num_tiles - 1)
    return [index * step + min(index, num_longer) for index in range(num_tiles)]


def assign_folds(num_tiles: Mapping[str, int], num_folds: int, seed: int) -> dict[str, int]:
    """Assign each group to a fold, so that all folds have about the same number of tiles.

    Shuffles the groups, then puts the largest remaining group into the emptiest fold.

    Args:
        num_tiles: number of tiles per group.
        num_folds: number of folds, limited to the number of groups.
        seed: seed of the order among groups of equal size.

    Raises:
        SourceError: there are fewer than two groups.
    """
    if len(num_tiles) < 2:
        raise SourceError(
            f"found {len(num_tiles)} patients, slides or images outside the test set "
            f"({', '.join(num_tiles) or 'none'}); expected 2 or more, for training and for "
            "validation. Add data, or make the test set smaller."
        )
    groups = sorted(num_tiles)
    np.random.default_rng(seed).shuffle(groups)
    loads = [0] * min(num_folds, len(groups))
    folds: dict[str, int] = {}
    for group in sorted(groups, key=lambda group: -num_tiles[group]):
        # Ties go to the last fold, so that validation (fold 0) rarely gets the largest group.
        fold = min(range(len(loads)), key=lambda fold: (loads[fold], -fold))
        folds[group] = fold
        loads[fold] += num_tiles[group]
    return folds


def draw_test_groups(groups: Iterable[str], share: float, seed: int) -> set[str]:
    """Draw a share of the groups for testing."""
    drawn = sorted(set(groups))
    np.random.default_rng(seed).shuffle(drawn)
    return set(drawn[: round(share * len(drawn))])


def _fold_rows(
    tiles: Sequence[tuple[str, str, int | None]], settings: TileSettings
) -> list[tuple[str, int, str]]:
    """Rows of folds.csv: the tile, its fold, drawn where it has none yet, and its group."""
    open_groups = Counter(group for _, group, fold in tiles if fold is None)
    drawn: dict[str, int] = {}
    if open_groups:
        drawn = assign_folds(open_groups, settings.num_folds, settings.seed)
    return [
        (tile_id, drawn[group] if fold is None else fold, group) for tile_id, group, fold in tiles
    ]


def resample_image(pixels: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    """Resample (H, W, 3) uint8 RGB: area mean to shrink, bicubic to enlarge."""
    image = Image.fromarray(pixels)
    method = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    return np.asarray(image.resize(resampled_size(image.size, scale), method))


def resample_labels(labels: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    """Resample (H, W) uint8 labels to the size of `resample_image`, by nearest neighbour."""
    size = resampled_size(labels.shape[::-1], scale)
    return np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))


def resampled_size(size: tuple[int, ...], scale: float) -> tuple[int, int]:
    """(width, height) after resampling. A scale within 0.5% of 1 changes nothing."""
    if abs(scale - 1) < 0.005:
        return size[0], size[1]
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
