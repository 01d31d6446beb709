"""The report's section on training time."""

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
    """Minutes of each row's training, also with the baseline's where a row needs its Dice."""
    lines = []
    for row in comparison.rows:
        lines.append([row.title, *_cells(comparison, row.name)])
        if row.strategy.needs_baseline:
            both = _cells(comparison, row.name, BASELINE.name)
            lines.append([f"{row.title}, with its baseline", *both])
    devices = sorted({result.device for result in comparison.results.values()})
    header = ["Method", "Wall-clock, minutes", "CPU time, minutes"]
    return (
        "## Training time\n\n"
        + markdown_table(header, lines, align="lr")
        + f"\n\nOn {'; '.join(devices)}, validation included. Compare CPU times on a CPU: "
        "wall-clock also counts other programs. Each run is in [times.csv](times.csv)."
    )


def _cells(comparison: Comparison, *stages: RowName) -> list[str]:
    """Wall-clock and CPU minutes of trainings that follow each other."""
    minutes = [[_minutes(comparison, name, cpu=cpu) for name in stages] for cpu in (False, True)]
    return [_text(np.sum(columns, axis=0)) for columns in minutes]


def _minutes(comparison: Comparison, name: RowName, *, cpu: bool) -> Floats:
    """A row's minutes by seed; NaN where they are not known."""
    seconds = [r.cpu_seconds if cpu else r.train_seconds for r in comparison.of(name)]
    return np.array(seconds, dtype=np.float64) / 60  # None becomes NaN


def _text(values: Floats) -> str:
    if np.isnan(values).any():
        return "–"
    return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")
