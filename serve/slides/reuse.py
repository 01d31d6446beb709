"""Which tiles run, and whose answers are kept: a tile that several blocks need runs once.

Blocks repeat the tiles at their edges: with tiles of 1024 px and blocks of 2048 cells, a quarter
more tiles. Where one worker runs neighbouring blocks, it keeps those answers until the last block
that needs them.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from serve.slides.tiling import TileRow


class Use(NamedTuple):
    """How a block gets the answer of one tile."""

    y: int
    """In pixels of the view."""
    x: int
    is_kept: bool
    """An earlier block ran the tile, and its answer is there."""
    keep: bool
    """A later block needs the answer, too."""


class Reuse:
    """Decides for each tile, in the order in which tiles are blended.

    Decisions need no answers, so that tiles can be read far ahead of the model.

    Args:
        blocks: the tiles of each block that will run, in that order.
        answer_bytes: size of one tile's answer.
        most_bytes: of the answers that are kept at the same time; tiles beyond run again.
    """

    def __init__(
        self,
        blocks: Iterable[Sequence[TileRow]],
        answer_bytes: int,
        most_bytes: int,
    ) -> None:
        self._left = Counter((row.y, x) for rows in blocks for row in rows for x in row.x)
        self._kept: set[tuple[int, int]] = set()
        self._most = most_bytes // answer_bytes

    def uses(self, rows: Sequence[TileRow], num_done: int) -> list[Use]:
        """How the next block gets its answers.

        Args:
            rows: its tiles.
            num_done: of its tiles, in order, that an earlier run has blended.
        """
        tiles = [(row.y, x) for row in rows for x in row.x]
        self._left.subtract(tiles[:num_done])
        return [self._use(tile) for tile in tiles[num_done:]]

    def _use(self, tile: tuple[int, int]) -> Use:
        self._left[tile] -= 1
        is_kept, is_needed = tile in self._kept, self._left[tile] > 0
        if is_kept and not is_needed:
            self._kept.remove(tile)
        elif is_needed and len(self._kept) < self._most:
            self._kept.add(tile)
        return Use(*tile, is_kept=is_kept, keep=tile in self._kept)


def to_run(uses: Iterable[Use]) -> list[TileRow]:
    """The tiles that have to be read and run, row by row."""
    rows: dict[int, list[int]] = {}
    for use in uses:
        if not use.is_kept:
            rows.setdefault(use.y, []).append(use.x)
    return [TileRow(y, tuple(columns)) for y, columns in rows.items()]
