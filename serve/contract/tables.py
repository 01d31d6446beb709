"""Text and tables as editors and spreadsheets on any system save them.

Tables have commas, semicolons or tabs between their cells. Where that is not a comma, numbers may
have a decimal comma, as spreadsheets write them in much of Europe.
"""

import codecs
import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_SEPARATORS = ",;\t"
_STATED = re.compile(r"sep=([,;\t])", re.IGNORECASE)
"""A first line that tells Excel the separator."""
_DECIMAL_COMMA = re.compile(r"([+-]?\d+),(\d+)")


class TableError(ValueError):
    """A file is not a table; the message says why, without naming the file."""


def decode_text(content: bytes) -> str:
    """Decode UTF-8 with or without a byte-order mark, or UTF-16 with one.

    Raises:
        UnicodeDecodeError: it is neither.
    """
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_utf16 else "utf-8-sig")


@dataclass(frozen=True)
class Table:
    """A table's cells, without the spaces around them."""

    columns: tuple[str, ...]
    rows: tuple[tuple[int, tuple[str, ...]], ...]
    """The line that a row ends on, and its cells; rows without any content are left out."""

    def records(self) -> Iterator[tuple[int, dict[str, str]]]:
        """The line of each row, and its cells by column; those that are missing are empty.

        Raises:
            TableError: a row has more cells than there are columns.
        """
        for line, cells in self.rows:
            if any(cells[len(self.columns) :]):
                raise TableError(
                    f"line {line} has {len(cells)} cells, expected {len(self.columns)}: put what "
                    "has a comma in quotes"
                )
            padded = (*cells, *("" for _ in self.columns))
            yield line, dict(zip(self.columns, padded, strict=False))


def read_table(path: Path) -> Table:
    """Read a table; its first line names the columns.

    Raises:
        OSError: the file cannot be opened.
        TableError: it is not text in UTF-8 or UTF-16, its quotes do not close, or two columns have
            one name.
    """
    try:
        text = decode_text(path.read_bytes())
    except UnicodeDecodeError as error:
        raise TableError(
            f'it is not UTF-8 ({error}). Save it as UTF-8; spreadsheets call it "CSV UTF-8"'
        ) from error
    header, _, below = text.partition("\n")
    if stated := _STATED.fullmatch(header.rstrip("\r")):
        header, text = below.partition("\n")[0], below
    separator = stated[1] if stated else max(_SEPARATORS, key=header.count)
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True
    )
    rows = []
    try:
        columns = [name.strip() for name in next(reader, [])]
        start = 1 if columns[:1] == [""] else 0  # an index, which pandas writes without a name
        while columns and not columns[-1]:  # columns of nothing, which spreadsheets write
            columns.pop()
        for row in reader:
            cells = tuple(_cell(cell, separator) for cell in row[start:])
            if any(cells):
                rows.append((reader.line_num + bool(stated), cells))
    except csv.Error as error:
        raise TableError(f"line {reader.line_num} cannot be read: {error}") from error
    named = columns[start:]
    if twice := [name for name in dict.fromkeys(named) if name and named.count(name) > 1]:
        raise TableError(f"it has {named.count(twice[0])} columns called {twice[0]}, expected one")
    return Table(tuple(named), tuple(rows))


def is_other_file(path: Path, columns: Iterable[str]) -> bool:
    """Whether something with content is at a path that is no CSV with these columns.

    Raises:
        PermissionError: it may not be looked at.
    """
    try:
        with path.open("rb") as file:
            head = decode_text(file.readline())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError:
        raise
    except (OSError, UnicodeDecodeError):
        return True
    return bool(head.strip()) and not set(columns) <= set(head.strip().split(","))


def named_file(folder: Path, name: str) -> Path:
    """The file that a table names, also where the table's system spells it differently.

    An umlaut may be one character or two, and Windows has backslashes between folders.
    """
    spellings = [
        unicodedata.normalize(form, text)
        for text in (name, name.replace("\\", "/"))
        for form in ("NFC", "NFD")
    ]
    candidates = [folder / spelling for spelling in (name, *spellings)]
    return next((path for path in candidates if exists(path)), candidates[0])


def is_text(path: Path) -> bool:
    """Whether a path can be written down: systems allow names that are not UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def exists(path: Path) -> bool:
    """Whether there is something at a path that the system lets us look at."""
    try:
        return path.exists()
    except OSError:  # too long a name, or a folder that may not be entered
        return False


def _cell(text: str, separator: str) -> str:
    text = text.strip()
    found = None if separator == "," else _DECIMAL_COMMA.fullmatch(text)
    return text if found is None else f"{found[1]}.{found[2]}"
