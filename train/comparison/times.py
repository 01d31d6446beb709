"""The report's section on training time: each row's, and HCFA's two stages against DFA's one."""

import re
from pathlib import Path

import numpy as np

from train.comparison.bootstrap import Floats
from train.comparison.compare import Comparison
from train.comparison.methods import BASELINE, RowName
from train.comparison.tables import markdown_table, write_csv

BUSY_SHARE = 0.6
"""Trainings that had less than this of their threads' time are told to have waited."""


def write_times(path: Path, comparison: Comparison) -> None:
    """Write every run's seconds as CSV."""
    lines = [
        [
            row.name,
            seed,
            f"{result.train_seconds:.1f}",
            "" if result.cpu_seconds is None else f"{result.cpu_seconds:.1f}",
            result.device,
        ]
        for row in comparison.rows
        for seed, result in zip(comparison.seeds, comparison.of(row.name), strict=True)
    ]
    write_csv(path, ["row", "seed", "train_seconds", "cpu_seconds", "device"], lines)


def times_section(comparison: Comparison) -> str:
    """Time of each row, and of HCFA's two stages against DFA's one.

    Where a CPU trained, its time counts, since wall-clock is also that of other programs.
    """
    results = comparison.results.values()
    devices = sorted({result.device for result in results})
    on_cpu = all(device.startswith("CPU") for device in devices)
    counts_cpu = on_cpu and all(result.cpu_seconds is not None for result in results)

    def minutes(name: RowName, *, cpu: bool = counts_cpu) -> Floats:
        seconds = [r.cpu_seconds if cpu else r.train_seconds for r in comparison.of(name)]
        return np.array(seconds, dtype=np.float64) / 60  # None becomes NaN

    kinds = {"CPU time": True, "Wall-clock": False} if on_cpu else {"Wall-clock": False}
    lines = [
        [row.title, *(_minutes(minutes(row.name, cpu=cpu)) for cpu in kinds.values())]
        for row in comparison.rows
    ]
    header = ["Method", *(f"{kind}, minutes" for kind in kinds)]
    text = "## Training time\n\n" + markdown_table(header, lines) + "\n\n"
    kind = "CPU time" if counts_cpu else "Wall-clock"
    if comparison.row("hcfa") and comparison.row("dfa"):
        first, second, one = (minutes(name) for name in (BASELINE.name, "hcfa", "dfa"))
        saved = 1 - one.mean() / (first + second).mean()
        text += (
            f"HCFA in two stages: {first.mean():.2f} min for the baseline whose Dice it needs, "
            f"{second.mean():.2f} min for itself, {(first + second).mean():.2f} min together. DFA "
            f"in one: {one.mean():.2f} min, {abs(saved):.0%} {'less' if saved > 0 else 'more'}. "
            "The paper claims about 40% less; of two stages of equally many epochs, one is half. "
        )
    text += f"{kind} of a training, validation included, on {'; '.join(devices)}"
    return f"{text}; each run's in [times.csv](times.csv).{_business(comparison)}"


def _business(comparison: Comparison) -> str:
    """Say it where the trainings had much less of their cores than they could use."""
    wall = cpu = 0.0
    for result in comparison.results.values():
        threads = re.search(r"threads: (\d+)", result.device)
        if threads and result.cpu_seconds is not None:
            wall += int(threads[1]) * result.train_seconds
            cpu += result.cpu_seconds
    if not wall or cpu > BUSY_SHARE * wall:
        return ""
    return (
        f" The trainings had {cpu / wall:.0%} of the cores they asked for; waiting and other "
        "programs took the rest, so wall-clock compares nothing here."
    )


def _minutes(values: Floats) -> str:
    if np.isnan(values).any():
        return "–"
    return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")
