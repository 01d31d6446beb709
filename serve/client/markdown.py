"""Tables in Markdown."""

from collections.abc import Iterable, Sequence

from tabulate import tabulate


def markdown_table(
    headers: Sequence[str], rows: Iterable[Sequence[object]], *, align: str
) -> list[str]:
    """Write a table in Markdown; a `|` inside a cell stays a character.

    Args:
        headers: of the columns.
        rows: cells are written unchanged; format numbers as text first.
        align: one letter per column, l or r.

    Returns:
        The table's lines.
    """
    sides = {"l": "left", "r": "right"}
    return tabulate(
        [[str(cell).replace("|", r"\|") for cell in row] for row in rows],
        headers=headers,
        tablefmt="pipe",
        disable_numparse=True,
        colalign=[sides[letter] for letter in align],
    ).splitlines()
