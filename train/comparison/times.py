"""The report's section on training time: each row's, and HCFA's two stages against DFA's one."""

from pathlib import Path

import numpy as np

from serve.contract.markdown import markdown_table
from train.comparison.bootstrap import Floats
from train.comparison.compare import Comparison
from train.comparison.methods import BASELINE, RowName
from train.comparison.tables import csv_number, write_csv


def write_times(path: Path, comparison: Comparison) -> None:
    """Write every run's seconds as CSV."""
    lines = [
        [
            row.name,
            seed,
            csv_number(result.train_seconds),
            csv_number(np.nan if result.cpu_seconds is None else result.cpu_seconds),
            result.device,
        ]
        for row in comparison.rows
        for seed, result in zip(comparison.seeds, comparison.of(row.name), strict=True)
    ]
    write_csv(path, ["row", "seed", "train_seconds", "cpu_seconds", "device"], lines)


def times_section(comparison: Comparison) -> str:
    """Minutes of each row's training, with the baseline's where a row needs its Dice."""
    lines = []
    for row in comparison.rows:
        stages = [row.name, *([BASELINE.name] if row.strategy.needs_baseline else [])]
        cells = []
        for cpu in (False, True):
            minutes = [_minutes(comparison, name, cpu=cpu) for name in stages]
            cells += [_text(minutes[0]), _text(np.sum(minutes, axis=0))]
        lines.append([row.title, *cells])
    header = ["Method", "Wall-clock, minutes", "with its baseline", "CPU time, minutes"]
    devices = sorted({result.device for result in comparison.results.values()})
    return (
        "## Training time\n\n"
        + markdown_table([*header, "with its baseline"], lines, align="lr")
        + f"\n\nOn {'; '.join(devices)}, validation included{_total(comparison)}; each run's in "
        "[times.csv](times.csv). "
        "Compare CPU times on a CPU: wall-clock also counts other programs. HCFA needs a trained "
        "baseline. The paper claims that DFA takes about 40% less time than the two stages of "
        "HCFA; of two stages of equally many epochs, one is half."
    )


def _total(comparison: Comparison) -> str:
    """CPU time of all runs together, where it is known of all."""
    seconds = [result.cpu_seconds for result in comparison.results.values()]
    known = [value for value in seconds if value is not None]
    if len(known) < len(seconds):
        return ""
    return f", {sum(known) / 60:.0f} CPU minutes for all {len(known)} trainings"


def _minutes(comparison: Comparison, name: RowName, *, cpu: bool) -> Floats:
    """A row's minutes by seed; NaN where they are not known."""
    seconds = [r.cpu_seconds if cpu else r.train_seconds for r in comparison.of(name)]
    return np.array(seconds, dtype=np.float64) / 60  # None becomes NaN


def _text(values: Floats) -> str:
    if np.isnan(values).any():
        return "–"
    return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")
