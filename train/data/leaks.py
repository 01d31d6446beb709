"""Finds what training would know of the test and validation images: patients and copies.

A patient's images in two splits, or one image under two names, make scores better than they will
be on new patients. Nothing fails, so nobody notices.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from train.data.folder import SPLITS, Split, Tile, TileFolder
from train.data.folds import FoldsRow
from train.data.images import inspect_image

_EFFECT = "scores will be better than on new patients"


def straddling(kind: str, places: Iterable[tuple[str | None, object]]) -> list[str]:
    """Find patients that are in several places.

    Args:
        kind: what the places are, in the plural.
        places: the patient, case or slide of each image, if it is known, and where the image is.
    """
    places_of: defaultdict[str, list[str]] = defaultdict(list)
    for group, place in places:
        if group and str(place) not in places_of[group]:
            places_of[group].append(str(place))
    mixed = sorted(group for group, found in places_of.items() if len(found) > 1)
    if not mixed:
        return []
    return [
        f"{len(mixed)} of {len(places_of)} patients or slides are in several {kind}, such as "
        f"{mixed[0]} in {' and '.join(places_of[mixed[0]])}: {_EFFECT}"
    ]


def leak_warnings(folder: TileFolder) -> list[str]:
    """Find patients and copies of images that are in several splits. Decodes images once."""
    places = [(tile.group, split) for split in SPLITS for tile in folder.tiles[split]]
    return straddling("splits", places) + copy_warnings(folder)


def copy_warnings(folder: TileFolder) -> list[str]:
    """Find images with the same pixels under several names. Images of one colour do not count."""
    copies: defaultdict[str, list[tuple[Split, Tile]]] = defaultdict(list)
    for split in SPLITS:
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
    return " and ".join(f"{names[split]} ({split})" for split in SPLITS if split in names)


def fold_warnings(rows: Sequence[FoldsRow]) -> list[str]:
    """Find patients in several folds, doubtful names of patients, and images named twice."""
    warnings = straddling("folds", sorted((row.group or "", row.fold) for row in rows))
    groups = dict.fromkeys(row.group for row in rows if row.group)
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for group in groups:
        alike[_plain(group)].append(group)
    if doubtful := [names for names in alike.values() if len(names) > 1]:
        listed = " and ".join(map(repr, doubtful[0]))
        warnings.append(
            f"{len(doubtful)} patients or slides may be written in several ways, such as {listed}: "
            "they count as different ones"
        )
    without = [row.tile_id for row in rows if not row.group]
    if groups and without:
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
