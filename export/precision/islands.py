"""Finds a minimal set of float32 islands with which a half precision graph passes the gate."""

from collections.abc import Callable, Sequence

Passes = Callable[[frozenset[str]], bool]


def smallest_islands(blocks: Sequence[str], passes: Passes) -> frozenset[str]:
    """Find a set of islands that passes, and that fails without any one of them.

    Uses Junker's QuickXplain (AAAI 2004). With k islands among n blocks, it calls `passes` about
    2 k log(n / k) times. Another set of the same size may pass, too. It never tries all blocks
    together, because that is float32.

    Args:
        blocks: the blocks that may become islands.
        passes: tells whether the graph passes with these islands. More islands never hurt.
    """
    return frozenset(_smallest(frozenset(), False, list(blocks), passes))


def _smallest(
    chosen: frozenset[str], grew: bool, candidates: list[str], passes: Passes
) -> list[str]:
    if grew and passes(chosen):
        return []
    if len(candidates) == 1:
        return candidates
    middle = len(candidates) // 2
    first, second = candidates[:middle], candidates[middle:]
    of_second = _smallest(chosen | set(first), True, second, passes)
    of_first = _smallest(chosen | set(of_second), bool(of_second), first, passes)
    return of_first + of_second
