"""regions.csv of BDSA's regions: which image is which place of which slide."""

import math
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from serve.contract.tables import TableError, read_table
from train.data.folds import refuse_misspelt
from train.errors import SourceError

_COLUMNS = ("image", "mpp", "x", "y", "base_mpp", "group", "annotation", "fold")
SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg")


def read_rows(path: Path, images: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """Read regions.csv as rows by image name; empty if the file does not exist.

    Raises:
        SourceError: it cannot be read, or does not have one row per image.
    """
    if not path.is_file():
        return {}
    try:
        table = read_table(path)
        if "image" not in table.columns:
            raise SourceError(
                f"{path} has the columns {', '.join(table.columns)}; expected image and optionally "
                f"{', '.join(_COLUMNS[1:])}"
            )
        refuse_misspelt(path, table.columns, _COLUMNS)
        rows: dict[str, dict[str, str]] = {}
        for line, row in table.records():
            name = unicodedata.normalize("NFC", _stem(row["image"]))
            if rows.setdefault(name, row) != row:
                raise SourceError(f"{path}, line {line}: {name} is there twice; expected one row.")
    except (OSError, TableError) as error:
        raise SourceError(f"{path} cannot be read: {error}.") from error
    if missing := sorted(rows.keys() ^ images.keys()):
        raise SourceError(
            f"{path} and images/ differ in {len(missing)} names, such as {missing[0]!r}; expected "
            "one row per image. Add the missing rows or images."
        )
    return rows


def _stem(name: str) -> str:
    return Path(name).stem if Path(name).suffix.lower() in SUFFIXES else name


def number_of(row: Mapping[str, str], column: str, default: float | None) -> float | None:
    """A number of a row, or the default where its cell is empty.

    Raises:
        ValueError: it is not a finite number.
    """
    text = (row.get(column) or "").strip()
    try:
        number = float(text) if text else default
    except ValueError:
        number = math.nan
    if number is not None and not math.isfinite(number):
        raise ValueError(f"{column} is {text!r}, expected a number")
    return number
