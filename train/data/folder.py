"""A data set's folder in SAM-Path's layout: read and checked.

ROOT/img/ID.{png,jpg,tif}   RGB images of any size
ROOT/mask/ID.{png,tif,bmp}  0 unlabelled, 1..C the classes; other forms: see `train.data.masks`
ROOT/folds.csv              columns img_id,fold: -1 test, 0 validation, others training; or
                            SAM-Path's cv.csv, which has these columns, too;
                            optionally mpp, um per pixel of that image, and group, its patient
ROOT/dataset.json           class names and colours, um per pixel of all other images; optionally
                            mask_colors and mask_values, what other colours and values mean

Where neither dataset.json nor folds.csv has any um per pixel, what the image files state counts,
as it does in serving.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

from serve.contract.json_text import parse_json
from serve.contract.tables import decode_text
from serve.images.mpp import MAX_MPP, MIN_MPP, PixelSize
from train.data.folds import folds_file, read_folds, refuse_misspelt
from train.data.images import own_pixel_sizes
from train.data.masks import MASK_SUFFIXES, MaskCode, mask_code
from train.errors import DatasetError, FocalPathError, ScaleError
from train.files import unique_keys
from train.settings import MAX_CLASSES, LabelClass, is_name

Split = Literal["training", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_SAME = 0.005
"""Share by which files may differ in um per pixel and still agree: they are rounded."""
_KEYS = ("mpp", "classes", "mask_colors", "mask_values", "mask_orientation")
"""Of dataset.json."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Tile:
    """An image and its mask on disk."""

    tile_id: str
    image: Path
    mask: Path
    mpp: float | None = None
    """um per pixel of the image, where pixels are not squares the side of the square with the same
    area; None where it is not known."""
    group: str | None = None
    """Patient, case or slide that the image is from; None where folds.csv does not say."""
    code: MaskCode | None = None
    """What the values and colours of the mask mean; None: values are labels."""
    sides: PixelSize | None = None
    """um per pixel along each axis, where the image's own file says that they differ."""

    @property
    def pixel_size(self) -> PixelSize | float | None:
        """The um per pixel to resample by."""
        return self.sides or self.mpp


@dataclass(frozen=True)
class TileFolder:
    """A data set in SAM-Path's layout, its images sorted into splits."""

    root: Path
    classes: tuple[LabelClass, ...]
    mpp: float | None
    """um per pixel of the images whose row of folds.csv has no mpp of its own. None where it is not
    known, or where the files themselves state it and differ."""
    tiles: dict[Split, tuple[Tile, ...]]
    mpp_is_of_files: bool = False
    """Neither dataset.json nor folds.csv has the um per pixel, but the image files state it."""

    @property
    def all_tiles(self) -> tuple[Tile, ...]:
        """The images of every split, in the order of `SPLITS`."""
        return tuple(tile for split in SPLITS for tile in self.tiles[split])


def read_tile_folder(root: Path) -> TileFolder:
    """Read and check the layout; pixels are not read.

    Raises:
        DatasetError: a file or a column is missing, or a class is named twice.
        ScaleError: a um per pixel is absurd.
    """
    description = root / "dataset.json"
    if not description.is_file():
        raise DatasetError(
            f"no data set at {root}: {description.name} is missing. Expected the layout img/, "
            'mask/, folds.csv and dataset.json: {"mpp": 0.25, "classes": [{"name": "Tumor", '
            '"color": "#d62728"}, ...]}'
        )
    classes, mpp, code = _read_description(description)
    images = _index(root / "img", IMAGE_SUFFIXES)
    masks = _index(root / "mask", MASK_SUFFIXES)
    tiles: dict[Split, list[Tile]] = {split: [] for split in SPLITS}
    splits: dict[int, Split] = {-1: "test", 0: "validation"}
    fold_of: dict[str, int] = {}
    for row in read_folds(folds_file(root)):
        if fold_of.setdefault(row.tile_id, row.fold) != row.fold:
            raise DatasetError(
                f"{folds_file(root)} puts {row.tile_id} into the folds {fold_of[row.tile_id]} and "
                f"{row.fold}; expected each image in one. Remove one of the lines."
            )
        name = unicodedata.normalize("NFC", row.tile_id)
        if name not in images:
            raise _missing(row.tile_id, root / "img", IMAGE_SUFFIXES)
        if name not in masks:
            raise _missing(row.tile_id, root / "mask", MASK_SUFFIXES)
        tile = Tile(row.tile_id, images[name], masks[name], row.mpp or mpp, row.group, code)
        tiles[splits.get(row.fold, "training")].append(tile)
    folder = TileFolder(root, classes, mpp, {split: tuple(found) for split, found in tiles.items()})
    is_known = mpp is not None or any(tile.mpp for tile in folder.all_tiles)
    return folder if is_known else _at_own_scale(folder)


def _at_own_scale(folder: TileFolder) -> TileFolder:
    """The same with the um per pixel that the image files state, where they do.

    Raises:
        ScaleError: a file states sides of a pixel that are too unequal.
    """
    paths = [tile.image for tile in folder.all_tiles]
    size_of = dict(zip(paths, own_pixel_sizes(paths), strict=True))
    sizes = [size for size in size_of.values() if size is not None]
    if not sizes:
        return folder

    def at_its_scale(tile: Tile) -> Tile:
        size = size_of[tile.image]
        if size is None:
            return tile
        return replace(tile, mpp=size.mean, sides=None if size.x == size.y else size)

    means = [size.mean for size in sizes]
    do_agree = len(sizes) == len(paths) and max(means) / min(means) - 1 <= _SAME
    return replace(
        folder,
        mpp=float(f"{median(means):.4g}") if do_agree else None,
        tiles={split: tuple(map(at_its_scale, tiles)) for split, tiles in folder.tiles.items()},
        mpp_is_of_files=True,
    )


def _read_description(path: Path) -> tuple[tuple[LabelClass, ...], float | None, MaskCode]:
    try:
        content = parse_json(_read_text(path), object_pairs_hook=unique_keys)
        classes = read_classes(path, content["classes"], DatasetError)
        mpp = None if content.get("mpp") is None else float(content["mpp"])
        if isinstance(content.get("mpp"), bool):
            raise ValueError(f"mpp is {content['mpp']}")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise DatasetError(
            f"{path} cannot be read ({error}); expected "
            '{"mpp": 0.25, "classes": [{"name": "Tumor", "color": "#d62728"}, ...]}'
        ) from error
    refuse_misspelt(path, content, _KEYS)
    if mpp is not None and not MIN_MPP <= mpp <= MAX_MPP:
        raise ScaleError(
            f"{path} has mpp {mpp}; expected um per pixel from {MIN_MPP:g} to {MAX_MPP:g}, or null"
        )
    return classes, mpp, _read_code(path, classes, content)


def read_classes(
    path: Path, entries: Any, error: type[FocalPathError], reserved: Sequence[str] = ()
) -> tuple[LabelClass, ...]:
    """Check a list of classes.

    Args:
        path: the file that has it.
        entries: a name and a colour each.
        error: raised where the classes cannot be a data set's.
        reserved: names that no class may have, besides "mean".

    Raises:
        TypeError: an entry is not a name and a colour.
    """
    classes = tuple(LabelClass(**entry) for entry in entries)
    names = [str(entry.name) for entry in classes]
    if not 2 <= len(names) <= MAX_CLASSES or len(set(names)) < len(names):
        raise error(
            f"{path} names {len(names)} classes ({len(set(names))} different); expected 2 to "
            f"{MAX_CLASSES}, each with its own name. For one class against the rest, name "
            "the rest, too"
        )
    for entry in classes:
        if entry.name in ("mean", *reserved) or not is_name(entry.name):
            others = f", and not {', '.join(reserved)}" if reserved else ""
            raise error(
                f"{path} names a class {entry.name!r}; expected one line of text without spaces "
                f"around it, and not 'mean', which is the score over all classes{others}"
            )
        if not is_color(entry.color):
            raise error(f"{path} gives {entry.name} the colour {entry.color!r}; expected #rrggbb")
    return classes


def is_color(text: object) -> bool:
    """Whether something is #rrggbb."""
    return isinstance(text, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", text) is not None


def _read_code(path: Path, classes: tuple[LabelClass, ...], content: dict[str, Any]) -> MaskCode:
    """What the masks' values and colours mean: the tables `mask_colors` and `mask_values`."""
    try:
        return mask_code(
            [entry.name for entry in classes],
            [entry.color for entry in classes],
            content.get("mask_colors"),
            content.get("mask_values"),
            content.get("mask_orientation"),
        )
    except (ValueError, AttributeError, TypeError) as error:
        raise DatasetError(
            f'{path}: {error}. Expected, where the masks need them: "mask_colors": {{"#rrggbb": '
            '"name of a class, or null"}, "mask_values": {"0": "name of a class, or null"}, '
            '"mask_orientation": "stored" or "upright".'
        ) from error


def _read_text(path: Path) -> str:
    """A text file: UTF-8, or UTF-16 with a byte-order mark.

    Raises:
        DatasetError: it is neither.
    """
    try:
        return decode_text(path.read_bytes())
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 ({error}). Save it as UTF-8.") from error


def _index(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The files of a folder by their names without suffix; the suffix in upper or lower case.

    An umlaut may be one character or two, depending on the system that wrote the name.
    """
    if not folder.is_dir():
        return {}
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        if not path.is_file():  # a folder, or a named pipe that nobody writes to
            continue
        name = unicodedata.normalize("NFC", path.stem)
        if name in found:
            raise DatasetError(
                f"{folder} has {found[name].name} and {path.name}; expected one file for {name!r}. "
                "Remove one of them."
            )
        found[name] = path
    return found


def _missing(tile_id: str, folder: Path, suffixes: tuple[str, ...]) -> DatasetError:
    alike = (path for path in folder.glob("*.*") if path.stem == tile_id)
    lossy = [path.name for path in alike if path.suffix.lower().startswith(".jp")]
    if lossy:
        return DatasetError(
            f"{folder / lossy[0]} is a JPEG, which changes labels along edges; expected "
            f"{tile_id}{suffixes[0]}. Save the mask as PNG where it was made."
        )
    wanted = _plain(tile_id.replace("\\", "/").rpartition("/")[2])
    meant = sorted(p.name for p in folder.glob("[!.]*") if _plain(p.stem) == wanted)
    hint = (
        f" Is {meant[0]} meant? Then write {Path(meant[0]).stem}: a name without its folder and "
        "suffix, with the zeros at its start, which spreadsheets drop."
        if meant
        else ""
    )
    return DatasetError(
        f"folds.csv names {tile_id!r}, but {folder} has no such file; expected "
        f"{tile_id}{suffixes[0]} (or {', '.join(suffixes[1:])}). Add the file or remove the line."
        f"{hint}"
    )


def _plain(name: str) -> str:
    """A name without what people and spreadsheets change: case, zeros before and after, suffix."""
    lowered = unicodedata.normalize("NFC", name).casefold()
    ending = next((end for end in (*IMAGE_SUFFIXES, ".0") if lowered.endswith(end)), "")
    return lowered.removesuffix(ending).lstrip("0")
