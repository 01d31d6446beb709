"""Finds what training would know of the test and validation images: patients and copies.

A patient's images in two splits, or one image under two names, make scores better than they will
be on new patients. Nothing fails, so nobody notices.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import get_args

from train.data.folder import Split, Tile, TileFolder
from train.data.folds import FoldsRow
from train.data.images import inspect_image

_EFFECT = "scores will be better than on new patients"
_SPLITS: tuple[Split, ...] = get_args(Split)


def leak_warnings(folder: TileFolder) -> list[str]:
    """Find patients and copies of images that are in several splits. Decodes images once."""
    split_of: defaultdict[str, set[Split]] = defaultdict(set)
    for split in _SPLITS:
        for tile in folder.tiles[split]:
            if tile.group:
                split_of[tile.group].add(split)
    mixed = {group: splits for group, splits in split_of.items() if len(splits) > 1}
    warnings = []
    if mixed:
        group = min(mixed)
        splits = " and ".join(split for split in _SPLITS if split in mixed[group])
        warnings.append(
            f"{len(mixed)} of {len(split_of)} patients or slides are in several splits, such as "
            f"{group} in {splits}: {_EFFECT}"
        )
    return warnings + copy_warnings(folder)


def copy_warnings(folder: TileFolder) -> list[str]:
    """Find images with the same pixels under several names. Images of one colour do not count."""
    copies: defaultdict[str, list[tuple[Split, Tile]]] = defaultdict(list)
    for split in _SPLITS:
        for tile in folder.tiles[split]:
            if digest := inspect_image(tile.image).digest:
                copies[digest].append((split, tile))
    repeated = [found for found in copies.values() if len({tile.image for _, tile in found}) > 1]
    leaked = [found for found in repeated if len({split for split, _ in found}) > 1]
    warnings = []
    if leaked:
        places = _first_of_each_split(leaked[0])
        warnings.append(
            f"{len(leaked)} images are in several splits under different names, such as {places}: "
            f"{_EFFECT}. Remove the copies from folds.csv"
        )
    if others := [found for found in repeated if found not in leaked]:
        names = " and ".join(tile.image.name for _, tile in others[0][:2])
        warnings.append(f"{len(others)} images are there under several names, such as {names}")
    return warnings


def _first_of_each_split(found: Iterable[tuple[Split, Tile]]) -> str:
    names = {split: tile.image.name for split, tile in reversed(list(found))}
    return " and ".join(f"{names[split]} ({split})" for split in _SPLITS if split in names)


def fold_warnings(rows: Sequence[FoldsRow]) -> list[str]:
    """Find patients in several folds, doubtful names of patients, and images named twice."""
    folds: defaultdict[str, set[int]] = defaultdict(set)
    for row in rows:
        if row.group:
            folds[row.group].add(row.fold)
    warnings = []
    if mixed := {group: found for group, found in folds.items() if len(found) > 1}:
        group = min(mixed)
        warnings.append(
            f"{len(mixed)} of {len(folds)} patients or slides are in several folds, such as "
            f"{group} in {sorted(mixed[group])}: {_EFFECT}"
        )
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for group in folds:
        alike[_plain(group)].append(group)
    if doubtful := [names for names in alike.values() if len(names) > 1]:
        listed = " and ".join(map(repr, doubtful[0]))
        warnings.append(
            f"{len(doubtful)} patients or slides may be written in several ways, such as {listed}: "
            "they count as different ones"
        )
    without = [row.tile_id for row in rows if not row.group]
    if folds and without:
        warnings.append(
            f"{len(without)} of {len(rows)} images have no group in folds.csv, such as "
            f"{without[0]}: each counts as a patient of its own"
        )
    names = Counter(row.tile_id for row in rows)
    if twice := sorted(name for name, count in names.items() if count > 1):
        warnings.append(f"folds.csv names {len(twice)} tiles more than once, such as {twice[0]}")
    return warnings


def _plain(group: str) -> str:
    """A name without what people write differently: case, spaces, signs, zeros before numbers."""
    return re.sub(r"(?<![0-9])0+(?=[0-9])", "", re.sub(r"[\s_.-]+", "-", group.casefold()))
