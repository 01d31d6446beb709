import pytest

from export.precision.islands import smallest_islands

BLOCKS = [f"block_{index}" for index in range(16)]


@pytest.mark.parametrize(
    "needed", [{"block_0"}, {"block_15"}, {"block_3", "block_4"}, {"block_1", "block_9"}]
)
def test_exactly_the_blocks_that_are_needed_are_found(needed: set[str]) -> None:
    assert smallest_islands(BLOCKS, lambda islands: needed <= islands) == needed


def test_one_of_two_blocks_that_would_do_is_enough() -> None:
    found = smallest_islands(BLOCKS, lambda islands: bool({"block_2", "block_11"} & islands))
    assert len(found) == 1


def test_one_culprit_among_sixteen_takes_few_tries() -> None:
    tries = []

    def passes(islands: frozenset[str]) -> bool:
        tries.append(islands)
        return "block_6" in islands

    smallest_islands(BLOCKS, passes)
    assert len(tries) <= 8


def test_where_only_all_blocks_would_do_all_are_named() -> None:
    assert smallest_islands(BLOCKS, lambda islands: len(islands) == len(BLOCKS)) == set(BLOCKS)
