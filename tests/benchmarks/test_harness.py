from pathlib import Path

import pytest

from benchmarks.harness import median_speedup, peak_memory_mib, take_turns, write_report


def test_variants_take_turns_within_each_round() -> None:
    order: list[str] = []
    variants = {name: (lambda name=name: order.append(name) or len(order)) for name in "ab"}
    assert take_turns(variants, 2) == {"a": [1, 3], "b": [2, 4]}
    assert order == ["a", "b", "a", "b"]


def test_a_speedup_compares_within_rounds_so_that_a_slow_round_changes_nothing() -> None:
    assert median_speedup([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0


def test_peak_memory_grows_with_what_is_allocated() -> None:
    before = peak_memory_mib()
    block = bytearray(b"x" * (64 << 20))
    assert peak_memory_mib() >= min(before + 32, before + len(block))


@pytest.mark.parametrize("text", [None, "# Report\n"])
def test_a_report_is_json_and_with_a_text_markdown_too(tmp_path: Path, text: str | None) -> None:
    write_report(tmp_path / "new", "benchmark", {"seconds": 1}, text)
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"benchmark.json", *(["benchmark.md"] if text else [])}
