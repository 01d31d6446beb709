"""Validate a data set in SAM-Path's layout: pixel shares of its classes, and what looks wrong.

What training could not read is an error (see `train.data.dataset`); what may only be unwise is a
warning.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from serve.images.mpp import Mpp, PixelSize, sides_of
from train.console import warn
from train.data.folder import SPLITS, Split, TileFolder, read_tile_folder
from train.data.folds import folds_file, read_folds
from train.data.images import inspect_image
from train.data.leaks import copy_warnings, fold_warnings
from train.data.pixels import count_all, require_trainable

TINY_SHARE = 0.01
"""A class with less of the labelled training pixels than this is warned about."""
LABELLED_SHARE_MIN = 0.5
"""A split with less of its pixels labelled than this is warned about."""
MPP_MIN, MPP_MAX = 0.1, 4.0
"""um per pixel of histology: 0.25 is a 40x objective, 4 a 2.5x one."""

MPP_TOLERANCE = 0.05
"""Share by which a file's own um per pixel may differ from the data set's without a warning."""

_CLUTTER = ("Thumbs.db", "desktop.ini")
"""What Explorer leaves in folders."""

Counts = dict[Split, NDArray[np.int64]]
"""(1 + C,) pixels per split, unlabelled first."""


def report(
    root: Path, found_before: list[str] | None = None, *, must_train: bool = False
) -> list[str]:
    """Read all masks of a data set, print the table of pixel shares and the warnings.

    Args:
        root: the data set.
        found_before: warnings of an earlier step, to print first.
        must_train: refuse, after the table, what `fit` would refuse.

    Returns:
        All warnings.

    Raises:
        FocalPathError: the data set cannot be trained on as it is.
    """
    folder = read_tile_folder(root)
    each = count_all(folder)
    counts = count_splits(folder, each)
    warnings = list(found_before or ()) + find_warnings(folder, counts)
    Console().print(share_table(folder, counts))
    for warning in warnings:
        warn(warning)
    if not warnings:
        Console().print("nothing looks wrong")
    if must_train:
        require_trainable(folder, each)
    return warnings


def count_splits(folder: TileFolder, each: Mapping[Split, NDArray[np.int64]]) -> Counts:
    """Add up the labels of every split, from those of each mask; those of an empty split are 0."""
    empty = np.zeros((0, 1 + len(folder.classes)), np.int64)
    return {split: np.asarray(each.get(split, empty).sum(axis=0)) for split in SPLITS}


def share_table(folder: TileFolder, counts: Counts) -> Table:
    """Tabulate each class's share of the labelled pixels, and the unlabelled of all, by split."""
    columns = [*(counts[split] for split in SPLITS), np.sum(list(counts.values()), axis=0)]
    table = Table(title=f"Labelled pixels, {_scale(folder)}")
    table.add_column("Class")
    for heading in (*(split.capitalize() for split in SPLITS), "All"):
        table.add_column(heading, justify="right")
    for label, entry in enumerate(folder.classes, start=1):
        shares = [_share(column[label], column[1:].sum()) for column in columns]
        table.add_row(f"[{entry.color}]■[/] {escape(entry.name)}", *shares)
    table.add_section()
    table.add_row("unlabelled", *[_share(column[0], column.sum()) for column in columns])
    sizes = [len(folder.tiles[split]) for split in SPLITS]
    table.add_row("tiles", *[str(size) for size in (*sizes, sum(sizes))])
    return table


def _scale(folder: TileFolder) -> str:
    """Describe the um per pixel of the images, and whether the files themselves state it."""
    known = [tile.mpp for tile in folder.all_tiles if tile.mpp is not None]
    of = ", as the image files state" if folder.mpp_is_of_files else ""
    if folder.mpp is not None:
        return f"{folder.mpp:g} um per pixel{of}"
    if not known:
        return "unknown um per pixel"
    return f"{min(known):.4g} to {max(known):.4g} um per pixel{of}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "-"


def find_warnings(folder: TileFolder, counts: Counts) -> list[str]:
    """List what looks wrong, the worst first."""
    return [
        *fold_warnings(list(read_folds(folds_file(folder.root)))),
        *copy_warnings(folder),
        *_split_warnings(folder, counts),
        *_class_warnings(folder, counts),
        *_resolution_warnings(folder),
        *stated_mpp_warnings(folder),
        *_file_warnings(folder),
    ]


def _split_warnings(folder: TileFolder, counts: Counts) -> list[str]:
    warnings = []
    purposes = {"training": "train on", "validation": "choose an epoch by", "test": "report"}
    for split in SPLITS:
        pixels = counts[split].sum()
        if not folder.tiles[split]:
            warnings.append(f"no {split} tile: there is nothing to {purposes[split]}")
        elif counts[split][0] > (1 - LABELLED_SHARE_MIN) * pixels:
            warnings.append(
                f"{_share(counts[split][0], pixels)} of the {split} pixels are unlabelled; "
                "learning and scores come from the others only"
            )
    return warnings


def _class_warnings(folder: TileFolder, counts: Counts) -> list[str]:
    warnings = []
    labelled = {split: counts[split][1:].sum() for split in SPLITS}
    for label, entry in enumerate(folder.classes, start=1):
        missing = [split for split in SPLITS if labelled[split] and not counts[split][label]]
        if missing:
            effect = "training refuses it" if "training" in missing else "its Dice is undefined"
            warnings.append(f"{entry.name} has no pixel for {' and '.join(missing)}: {effect}")
        if 0 < counts["training"][label] < TINY_SHARE * labelled["training"]:
            share = _share(counts["training"][label], labelled["training"])
            warnings.append(
                f"{entry.name} is tiny: {share} of the labelled training pixels (below "
                f"{TINY_SHARE:.0%})"
            )
    return warnings


def _resolution_warnings(folder: TileFolder) -> list[str]:
    if folder.mpp is None:
        give = "give --mpp to `fit`, or mpp in dataset.json"
        if any(tile.mpp for tile in folder.all_tiles):
            return [f"the images differ in um per pixel, and dataset.json has no mpp: {give}"]
        return [f"no um per pixel is known, so the model cannot say which it needs; {give}"]
    if not MPP_MIN <= folder.mpp <= MPP_MAX:
        return [
            f"dataset.json has mpp {folder.mpp:g}; expected um per pixel from {MPP_MIN} to "
            f"{MPP_MAX} (a 40x objective is about 0.25), not a magnification"
        ]
    return []


def stated_mpp_warnings(folder: TileFolder) -> list[str]:
    """Find images whose own files state another um per pixel than the data set."""
    others = []
    for tile in folder.all_tiles:
        facts = inspect_image(tile.image)
        if facts.pixel_size is None or _is_near(facts.pixel_size, tile.pixel_size):
            continue
        others.append(f"{tile.image.name} ({facts.pixel_size}, by its {facts.mpp_source})")
    if not others:
        return []
    counted = "the data set's is unknown" if folder.mpp is None else f"counted is {folder.mpp:g}"
    return [
        f"{len(others)} files state another um per pixel, such as {others[0]}: {counted}, unless "
        "folds.csv has a column mpp. Correct the one that is wrong"
    ]


def _is_near(stated: PixelSize, counted: Mpp | None) -> bool:
    """Whether the data set's um per pixel is about what an image's file states, on both axes."""
    pairs = zip(stated, sides_of(counted or 0.0), strict=True)
    return all(abs(own - other) <= MPP_TOLERANCE * other for own, other in pairs)


def _file_warnings(folder: TileFolder) -> list[str]:
    """Find images that folds.csv forgets."""
    named = {tile.image for tile in folder.all_tiles}
    forgotten = sorted(
        path.name
        for path in (folder.root / "img").iterdir()
        if path not in named and not path.name.startswith(".") and path.name not in _CLUTTER
    )
    if not forgotten:
        return []
    return [
        f"folds.csv does not name {len(forgotten)} files of img/, such as {forgotten[0]}: they are "
        "not used"
    ]
