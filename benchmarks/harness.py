"""Code that the benchmarks share: turns, medians, memory, the machine, and the report's files.

Variants take turns within each round, so that whatever else the machine does affects all of them. A
speed-up is the median over the rounds of the ratio within one round, never a ratio between rounds.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from export.errors import FocalPathError as ExportError
from serve.contract.errors import FocalPathError as ServeError
from serve.contract.machine import this_processor, usable_cpus
from train.errors import FocalPathError as TrainError

T = TypeVar("T")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End a command with one line where the user can fix what is wrong; also a decorator."""
    try:
        yield
    except (ServeError, TrainError, ExportError) as error:
        sys.exit(f"error: {error}")


def take_turns(
    variants: Mapping[str, Callable[[], T]],
    num_rounds: int,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, list[T]]:
    """Call every variant once per round, in their order.

    Args:
        variants: functions by name.
        num_rounds: number of turns of each variant.
        tell: called with the round and the name of the next variant.

    Returns:
        Each variant's results, one per round.
    """
    results: dict[str, list[T]] = {name: [] for name in variants}
    for index in range(num_rounds):
        for name, run in variants.items():
            tell(f"round {index + 1} of {num_rounds}: {name}")
            results[name].append(run())
    return results


def seconds_of(run: Callable[[], object]) -> float:
    """Duration of a call in seconds."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def median_speedup(baseline: Sequence[float], own: Sequence[float]) -> float:
    """Median over the rounds of the baseline's time divided by the variant's own."""
    return statistics.median(base / ours for base, ours in zip(baseline, own, strict=True))


def machine_line() -> str:
    """The processor and the number of usable CPUs, for the head of a report."""
    return f"{this_processor().title}, {usable_cpus()} CPUs"


def packages_text(versions: Mapping[str, str]) -> str:
    """Packages and their versions, for the head of a report."""
    return ", ".join(f"{name} {found}" for name, found in versions.items())


def write_report(
    folder: Path, name: str, report: BaseModel | Mapping[str, Any], markdown: str | None = None
) -> None:
    """Write `name.json`, and `name.md` if there is Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    content = report.model_dump(mode="json") if isinstance(report, BaseModel) else report
    text = json.dumps(content, indent=2) + "\n"
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    if markdown is not None:
        (folder / f"{name}.md").write_text(markdown, encoding="utf-8")
