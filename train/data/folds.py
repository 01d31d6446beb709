"""folds.csv: which images a data set has, and which fold, patient and um per pixel each has."""

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from serve.contract.errors import OptionError
from serve.contract.tables import TableError, read_table
from serve.images.mpp import MAX_MPP, MIN_MPP, check_mpp
from train.errors import DatasetError, ScaleError

_COLUMNS = ("img_id", "fold", "group", "mpp")
_TCGA_PATIENT = re.compile(r"TCGA-\w{2}-\w{4}")
_ALIKE = 0.75
"""How much of a name has to be that of another to be a slip of it (our choice)."""


class FoldsRow(NamedTuple):
    """A line of folds.csv."""

    tile_id: str
    fold: int
    mpp: float | None
    group: str | None
    """Patient, case or slide: the column's, else the patient in the names of TCGA."""


def folds_file(root: Path) -> Path:
    """A data set's folds.csv, or SAM-Path's own cv.csv, which has the same columns."""
    folds, sam_path = root / "folds.csv", root / "cv.csv"
    return sam_path if sam_path.is_file() and not folds.is_file() else folds


def read_folds(path: Path) -> Iterator[FoldsRow]:
    """Read folds.csv, as spreadsheets save it; see `serve.contract.tables`.

    Raises:
        DatasetError: the file is missing or not a table, or a value is not what its column holds.
        ScaleError: a um per pixel is absurd.
    """
    if not path.is_file():
        raise DatasetError(f"{path} is missing; expected a CSV with columns img_id,fold")
    try:
        table = read_table(path)
        if not {"img_id", "fold"} <= set(table.columns):
            raise DatasetError(
                f"{path} has the columns {', '.join(table.columns)}; expected img_id and fold"
            )
        refuse_misspelt(path, table.columns, _COLUMNS)
        for line, row in table.records():
            fold = _row_fold(path, line, row["fold"])
            mpp = _row_mpp(path, line, row.get("mpp", ""))
            group = row.get("group") or tcga_patient(row["img_id"])
            yield FoldsRow(row["img_id"], fold, mpp, group)
    except (TableError, OSError) as error:
        raise DatasetError(f"{path} cannot be read: {error}.") from error


def tcga_patient(name: str) -> str | None:
    """The patient in a name of TCGA's, such as TCGA-A1-A0SK of TCGA-A1-A0SK-DX1_0_0."""
    found = _TCGA_PATIENT.search(name)
    return None if found is None else found[0]


def _row_fold(path: Path, line: int, text: str) -> int:
    """A fold; 1.0 is 1, as programs write whole numbers of a column that has gaps."""
    try:
        fold = float(text)
        if fold.is_integer():
            return int(fold)
    except ValueError:
        pass
    raise DatasetError(
        f"{path}, line {line}: fold is {text!r}; expected a whole number: -1 test, 0 validation, "
        "others training"
    )


def _row_mpp(path: Path, line: int, text: str) -> float | None:
    if not text:
        return None
    try:
        mpp = float(text)
        check_mpp(mpp)
    except (ValueError, OptionError) as error:
        raise ScaleError(
            f"{path}, line {line}: mpp is {text!r}; expected um per pixel from {MIN_MPP:g} to "
            f"{MAX_MPP:g}, or nothing for dataset.json's"
        ) from error
    return mpp


def refuse_misspelt(path: Path, found: Iterable[str], known: Sequence[str]) -> None:
    """Raise DatasetError for a name that is nearly a known one, and would be ignored.

    Other names that are not known are the user's own notes.
    """
    for name in found:
        near = get_close_matches(name.strip().casefold(), known, n=1, cutoff=_ALIKE)
        if near and name not in known:
            raise DatasetError(
                f"{path} has {name!r}, which means nothing here. Is {near[0]!r} meant? Rename it, "
                "or remove it."
            )
