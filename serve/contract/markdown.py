"""Tables in Markdown."""

from collections.abc import Iterable, Sequence

from tabulate import tabulate


def markdown_table(
    headers: Sequence[str], rows: Iterable[Sequence[object]], *, align: str = "l"
) -> str:
    """Write a table in Markdown; a `|` inside a cell, such as in a class's name, stays a character.

    Args:
        headers: of the columns.
        rows: cells are written as they are; give numbers as text in the wanted form.
        align: one letter per column, l or r; the last one holds for the columns after it, too.
    """
    sides = {"l": "left", "r": "right"}
    return tabulate(
        [[_escaped(cell) for cell in row] for row in rows],
        headers=[_escaped(header) for header in headers],
        tablefmt="pipe",
        disable_numparse=True,
        colalign=[sides[letter] for letter in align.ljust(len(headers), align[-1])],
    )


def _escaped(cell: object) -> str:
    return str(cell).replace("|", "\\|").replace("\n", " ")
