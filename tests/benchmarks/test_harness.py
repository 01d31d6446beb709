from pathlib import Path
from types import ModuleType

import pytest

import export.errors
import serve.contract.errors
import train.errors
from benchmarks.harness import median_speedup, one_line_errors, take_turns, write_report


def test_variants_take_turns_within_each_round() -> None:
    order: list[str] = []
    variants = {name: (lambda name=name: order.append(name) or len(order)) for name in "ab"}
    assert take_turns(variants, 2) == {"a": [1, 3], "b": [2, 4]}
    assert order == ["a", "b", "a", "b"]


def test_a_speedup_compares_within_rounds_so_that_a_slow_round_changes_nothing() -> None:
    assert median_speedup([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0


@pytest.mark.parametrize("text", [None, "# Report\n"])
def test_a_report_is_json_and_with_a_text_markdown_too(tmp_path: Path, text: str | None) -> None:
    write_report(tmp_path / "new", "benchmark", {"seconds": 1}, text)
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"benchmark.json", *(["benchmark.md"] if text else [])}


@pytest.mark.parametrize("errors", [train.errors, export.errors, serve.contract.errors])
def test_what_the_user_can_fix_is_one_line(errors: ModuleType) -> None:
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise errors.SettingsError("--side is 0; expected at least 1.")
    assert ended.value.code == "error: --side is 0; expected at least 1."
