import numpy as np
import pytest

from serve.slides.reuse import Reuse, to_run
from serve.slides.tiling import TileRow


def blocks_of(side: int, reach: int) -> list[list[TileRow]]:
    """Blocks of a square of tiles, row by row; each has `reach` more tiles on every side."""
    blocks = []
    for top in range(0, side, 3):
        for left in range(0, side, 3):
            columns = range(max(left - reach, 0), min(left + 3 + reach, side))
            rows = range(max(top - reach, 0), min(top + 3 + reach, side))
            blocks.append([TileRow(y, tuple(columns)) for y in rows])
    return blocks


@pytest.mark.parametrize("most", [0, 1, 7, 1000])
@pytest.mark.parametrize("reach", [0, 1, 4])
def test_every_kept_answer_is_there_and_none_stays(most: int, reach: int) -> None:
    blocks = blocks_of(12, reach)
    reuse = Reuse(blocks, answer_bytes=10, most_bytes=10 * most)
    held: set[tuple[int, int]] = set()
    num_run = peak = 0
    for rows in blocks:
        uses = reuse.uses(rows, 0)
        assert [(use.y, use.x) for use in uses] == [(row.y, x) for row in rows for x in row.x]
        for use in uses:
            assert use.is_kept == ((use.y, use.x) in held)
            (held.add if use.keep else held.discard)((use.y, use.x))
            peak = max(peak, len(held))
        num_run += sum(len(row.x) for row in to_run(uses))
    assert peak <= most
    assert not held
    num_tiles = sum(len(row.x) for rows in blocks for row in rows)
    assert num_run == {0: num_tiles, 1000: 144}.get(most, num_run)
    assert 144 <= num_run <= num_tiles


def test_tiles_that_an_earlier_run_has_blended_are_not_kept() -> None:
    """Their answers went with that run; the block beside it has to run them."""
    row = TileRow(0, (0, 1, 2))
    reuse = Reuse([[row], [TileRow(0, (1, 2, 3))]], answer_bytes=1, most_bytes=100)
    assert [(use.x, use.keep) for use in reuse.uses([row], 2)] == [(2, True)]
    uses = reuse.uses([TileRow(0, (1, 2, 3))], 0)
    assert [use.is_kept for use in uses] == [False, True, False]
    assert not any(use.keep for use in uses)


def test_what_runs_is_read_row_by_row() -> None:
    rng = np.random.default_rng(0)
    blocks = blocks_of(9, 1)
    reuse = Reuse(blocks, answer_bytes=1, most_bytes=5)
    for rows in blocks:
        uses = reuse.uses(rows, int(rng.integers(3)))
        found = [(row.y, x) for row in to_run(uses) for x in row.x]
        assert found == sorted((use.y, use.x) for use in uses if not use.is_kept)
