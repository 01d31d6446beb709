"""The report's section on training time."""

import numpy as np

from serve.contract.markdown import markdown_table
from train.comparison.bootstrap import Floats
from train.comparison.compare import Comparison
from train.comparison.methods import BASELINE, RowName
from train.comparison.tables import mean_std


def times_section(comparison: Comparison) -> str:
    """Minutes of each row's training, also with the baseline's where a row needs its Dice."""
    lines = []
    for row in comparison.rows:
        own = _seconds(comparison, row.name)
        lines.append([row.title, *_minutes(own)])
        if row.strategy.needs_baseline:
            both = own + _seconds(comparison, BASELINE.name)
            lines.append([f"{row.title}, with its baseline", *_minutes(both)])
    devices = sorted({result.device for result in comparison.results.values()})
    header = ["Method", "Wall-clock, minutes", "CPU time, minutes"]
    return (
        "## Training time\n\n"
        + markdown_table(header, lines, align="lr")
        + f"\n\nOn {'; '.join(devices)}, validation included. Compare CPU times on a CPU: "
        "wall-clock also counts other programs."
    )


def _seconds(comparison: Comparison, name: RowName) -> Floats:
    """Wall-clock and CPU time of each seed, (S, 2); NaN where it is not known."""
    results = comparison.of(name)
    return np.array([(r.train_seconds, r.cpu_seconds) for r in results], dtype=np.float64)


def _minutes(seconds: Floats) -> list[str]:
    return [mean_std(column / 60, digits=2) for column in seconds.T]
