"""The comparison's tables: Table 1's form (arXiv 2604.13479) as Markdown and LaTeX, and CSVs.

Where the data set is one of the paper's, the published numbers stand beside ours.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tabulate import tabulate

from serve.contract.markdown import markdown_table
from train.comparison.bootstrap import Bootstrap, Floats, Interval, seed_scores
from train.comparison.compare import Comparison
from train.comparison.methods import BASELINE, Row, RowName

Metric = Literal["dice", "iou"]
METRICS: tuple[tuple[Metric, str], ...] = (("dice", "Dice"), ("iou", "IoU"))
MEAN = "Mean"
"""The line over the classes."""

Published = dict[tuple[str, RowName, Metric], float]
"""Scores of the published table by class (or "Mean"), row and metric."""


def published_scores(comparison: Comparison) -> Published:
    """The published scores of this data set; none where the preset or the classes are others."""
    lines = Path(__file__).with_name("published_table1.csv").read_text(encoding="utf-8").split("\n")
    rows = [
        row
        for row in csv.DictReader(line for line in lines if not line.startswith("#"))
        if row["dataset"].lower() == comparison.settings.preset
    ]
    if {row["class"] for row in rows} != set(class_lines(comparison)):
        return {}
    return {
        (row["class"], method.name, metric): float(row[f"{method.name}_{metric}"])
        for row in rows
        for method in table_rows(comparison)
        for metric, _ in METRICS
        if f"{method.name}_{metric}" in row
    }


def class_lines(comparison: Comparison) -> list[str]:
    """The lines of a table: the mean, then each class."""
    return [MEAN, *(entry.name for entry in comparison.data.classes)]


def table_rows(comparison: Comparison) -> list[Row]:
    """The methods of Table 1 that take part, and those that are not the paper's."""
    return [row for row in comparison.rows if not row.is_ablation]


class Table1:
    """Scores over seeds of every method, class and metric, and the published ones."""

    def __init__(self, comparison: Comparison) -> None:
        self.published = published_scores(comparison)
        self._lines = class_lines(comparison)
        self._rows = table_rows(comparison)
        self._scores = {
            (row.name, metric): seed_scores(comparison, row.name, metric)
            for row in self._rows
            for metric, _ in METRICS
        }

    def markdown(self) -> str:
        """One table per metric; the highest mean of a line is bold."""
        return "\n\n".join(
            markdown_table(self._header(title), self._cells(metric, bold="**"), align="lr")
            for metric, title in METRICS
        )

    def latex(self, caption: str) -> str:
        """One booktabs `tabular` per metric in a `table*`."""
        tables = [
            tabulate(
                self._cells(metric),
                self._header(title),
                tablefmt="latex_booktabs",
                disable_numparse=True,
            )
            for metric, title in METRICS
        ]
        parts = [
            "% needs \\usepackage{booktabs}",
            "\\begin{table*}\n\\centering\\footnotesize",
            f"\\caption{{{caption}}}",
            "\n\\par\\medskip\n".join(tables),
            "\\end{table*}",
        ]
        return "\n".join(parts) + "\n"

    def _header(self, title: str) -> list[str]:
        return [title, *(row.title for row in self._rows)]

    def _cells(self, metric: Metric, bold: str = "") -> list[list[str]]:
        lines = []
        for index, line in enumerate(self._lines):
            scores = [self._scores[row.name, metric][:, index] for row in self._rows]
            # As printed; none is the best where all are.
            means = [round(float(values.mean()), 4) for values in scores]
            best = max(means) if len(set(means)) > 1 else None
            marks = [bold if mean == best else "" for mean in means]
            texts = map(mean_std, scores)
            lines.append([line, *(f"{m}{t}{m}" for m, t in zip(marks, texts, strict=True))])
            if self.published:
                numbers = [
                    self.published.get((line, row.name, metric), np.nan) for row in self._rows
                ]
                lines.append(["published", *(mean_std(np.array([n])) for n in numbers)])
        return lines


def write_intervals(path: Path, comparison: Comparison, bootstrap: Bootstrap) -> None:
    """Every row's Dice and IoU, and its difference to the baseline: the mean and each class."""
    seeds = [f"difference_seed{seed}" for seed in comparison.seeds]
    header = ["row", "class", "dice", "dice_low", "dice_high", "dice_std", "iou", "iou_std"]
    header += ["difference", "difference_low", "difference_high", "verdict", *seeds]
    lines: list[list[str]] = []
    for row in comparison.rows:
        intervals, differences = bootstrap.dice(row.name), bootstrap.differences(row.name)
        dice_of, iou_of = (seed_scores(comparison, row.name, metric) for metric, _ in METRICS)
        for index, line in enumerate(class_lines(comparison)):
            dice, iou, other = dice_of[:, index], iou_of[:, index], differences[index]
            spread = (deviation(dice), iou.mean(), deviation(iou))
            numbers = [csv_number(v) for v in (*intervals[index], *spread, *other.interval)]
            per_seed = [csv_number(value) for value in other.per_seed]
            verdict = "" if row.name == BASELINE.name else other.verdict
            lines.append([row.name, line, *numbers, verdict, *per_seed])
    write_csv(path, header, lines)


def difference_table(bootstrap: Bootstrap, pairs: Sequence[tuple[Row, Row]]) -> str:
    """Mean Dice of rows, and their difference to another row, each with its interval."""
    lines = []
    for row, other in pairs:
        difference = bootstrap.differences(row.name, other.name)[0]
        dice = interval_text(bootstrap.dice(row.name)[0])
        gain = interval_text(difference.interval, sign=True)
        lines.append([row.title, dice, other.title, gain, difference.verdict])
    header = ["Method", "Mean Dice", "Compared with", "Difference", "Verdict"]
    return markdown_table(header, lines, align="lr")


def write_bias_csv(
    path: Path,
    comparison: Comparison,
    baseline: Floats,
    prior: Floats,
    deltas: dict[RowName, Floats],
) -> None:
    """What Fig. 2 and 3 show: pixel share, baseline Dice, prior and learned biases (seeds, C)."""
    card = comparison.of(BASELINE.name)[0].card
    header = ["class", "pixel_share", "baseline_dice", "prior"]
    header += [f"{name}_{kind}" for name in deltas for kind in ("mean", "std")]
    lines = []
    for index, entry in enumerate(card.classes):
        cells = [card.shares[index], baseline[:, index].mean(), prior[index]]
        for delta in deltas.values():
            cells += [delta[:, index].mean(), deviation(delta[:, index])]
        lines.append([entry.name, *map(csv_number, cells)])
    write_csv(path, header, lines)


def write_csv(path: Path, header: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """Write a CSV with line feeds."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(header)
        rows.writerows(lines)


def deviation(values: Floats) -> float:
    """Sample standard deviation; NaN for one value."""
    return float(values.std(ddof=1)) if len(values) > 1 else np.nan


def mean_std(values: Floats, digits: int = 4) -> str:
    """`0.7123 ± 0.0045`, without the deviation where there is one value."""
    if np.isnan(values).any():
        return "–"
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {deviation(values):.{digits}f}"


def interval_text(interval: Interval, *, sign: bool = False) -> str:
    """`0.7123 [0.7001, 0.7245]`."""
    estimate, low, high = (f"{value:+.4f}" if sign else f"{value:.4f}" for value in interval)
    return f"{estimate} [{low}, {high}]"


def csv_number(value: float) -> str:
    """A number in six digits; nothing for NaN."""
    return "" if np.isnan(value) else f"{value:.6g}"
