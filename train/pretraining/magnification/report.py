"""The report of a study across magnifications: tables, one figure, and differences with intervals.

REPORT/README.md, probes.csv, segmentation.csv, retention.png
"""

import csv
import itertools
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from serve.contract.markdown import markdown_table
from train.intervals import bootstrap_interval
from train.pretraining.magnification.evaluate import EncoderResult
from train.pretraining.magnification.probe import NUM_RESAMPLES, retention
from train.pretraining.magnification.settings import EvaluationSettings
from train.pretraining.magnification.tiles import COLORS

Results = Mapping[str, Sequence[EncoderResult]]
"""Of each encoder, one result per seed."""
_GREY = 7
"""Place of matplotlib's grey among its ten colours; the untrained encoder is grey."""

_INTRODUCTION = """# Encoders across magnifications

A linear probe is trained on frozen embeddings of tiles at {coarse:g} um per pixel and tested at
every scale, on slides that no encoder has seen. Balanced accuracy; chance is {chance:.2f}.
`retained` is M({coarse:g} to {fine:g}) over M({coarse:g} to {coarse:g}), the headline of
arXiv 2512.14796 (0.967 there, on other data, with an encoder and tiles that are not known);
`above chance` is the same with chance taken off; `of ceiling` is M({coarse:g} to {fine:g}) over
M({fine:g} to {fine:g}). Brackets are 95% intervals of a bootstrap of {resamples} resamples, each
of which draws cases and seeds with replacement; the percentiles are expanded for few seeds or
cases (Hesterberg 2015, arXiv 1411.5279). Where most of the spread is between 2 or 3 of them, only
50% or 75% of the intervals hold the true value.

The ratios alone say nothing: an encoder at chance everywhere retains 100%. `random` is an untrained
encoder; mean colour survives any change of scale, so only colour-matched rows (each tile's optical
density brought to one mean and deviation) tell what was learned of texture and shape.
"""


def write_report(
    results: Results, settings: EvaluationSettings, num_classes: int, num_cases: int, folder: Path
) -> Path:
    """Write tables and the figure; returns README.md.

    Args:
        results: what was measured.
        settings: which tiles.
        num_classes: of the labelled tiles.
        num_cases: patients or slides that a resample draws.
        folder: of the report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    coarse, fine = settings.scales[0], settings.scales[-1]
    text = [
        _INTRODUCTION.format(
            coarse=coarse, fine=fine, chance=1 / num_classes, resamples=NUM_RESAMPLES
        ),
    ]
    for color in COLORS:
        rows = [
            _probe_row(name, found, color, num_classes, num_cases)
            for name, found in results.items()
        ]
        text += [f"\n## Probes, {color}, same pixels at every scale\n", _table(rows)]
        field = [
            _field_row(name, found, color, num_classes)
            for name, found in results.items()
            if all(result.field_probes for result in found)
        ]
        if field:
            text += [f"\n## Probes, {color}, same field at every scale\n", _table(field)]
    text += list(_differences(results, num_cases))
    text += ["\n![Balanced accuracy at every scale](retention.png)\n"]
    text += ["\n## Retrieval of a place by its detail, and segmentation\n"]
    places = next(iter(results.values()))[0].retrieval[COLORS[0]].num_places
    text += [_SEGMENTATION.format(places=places)]
    for color in COLORS:
        rows = [_other_row(name, found, color, num_cases) for name, found in results.items()]
        text += [f"\n{color.capitalize()}:\n", _table(rows)]
    readme = folder / "README.md"
    readme.write_text("\n".join(text) + "\n", encoding="utf-8")
    _write_csv(folder / "probes.csv", results, settings)
    draw_retention(results, settings, folder / "retention.png")
    return readme


_SEGMENTATION = """Recall at 1: how often the mean embedding of the fine tiles that fill a coarse
tile finds that tile among all {places}; the mean of 1 / rank beside it. mIoU: a linear head on
patch tokens, trained at the coarsest scale, on cells of 8 um. Consistency is the mIoU of the
coarsest scale's maps with the finest scale's, and worth nothing without retention. Speckle is the
share of the area in components below 400 um2, minus the truth's."""


def _table(rows: Sequence[Mapping[str, object]]) -> str:
    cells = [
        [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row.values()]
        for row in rows
    ]
    return markdown_table(list(rows[0]), cells, align="lr")


def _probe_row(
    name: str, found: Sequence[EncoderResult], color: str, num_classes: int, num_cases: int
) -> dict[str, object]:
    matrices, num_drawn = _matrix(found, color), (len(found), num_cases)
    resampled = _resampled(name, [result.probes[color].resampled for result in found])
    ratios = retention(matrices, num_classes)
    home, away = resampled[:, 0, 0], resampled[:, 0, -1]
    drawn = np.divide(away, home, out=np.full_like(away, np.nan), where=home > 0)
    return {
        "encoder": name,
        "seeds": len(found),
        "coarse to coarse": matrices[0, 0],
        "coarse to fine": _with_interval(matrices[0, -1], resampled[:, 0, -1], num_drawn),
        "fine to fine": matrices[-1, -1],
        "fine to coarse": matrices[-1, 0],
        "retained": _with_interval(ratios.retained, drawn, num_drawn),
        "above chance": ratios.above_chance,
        "of ceiling": ratios.of_ceiling,
        "scale leakage": float(np.mean([result.probes[color].leakage for result in found])),
    }


def _matrix(found: Sequence[EncoderResult], color: str) -> NDArray[np.float64]:
    """Mean over seeds of balanced accuracy, (trained at, tested at)."""
    return np.asarray(np.mean([result.probes[color].matrix for result in found], axis=0))


def _resampled(name: str, of_seeds: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Each resample's mean over as many seeds as there are, drawn with replacement.

    Args:
        name: the encoder's; encoders draw their seeds independently.
        of_seeds: of each seed, (resamples, ...).
    """
    stacked = np.stack(of_seeds)  # seeds x resamples x ...
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    drawn = rng.integers(len(stacked), size=stacked.shape[:2])
    rows = np.arange(stacked.shape[1])
    return np.asarray(np.mean([stacked[seeds, rows] for seeds in drawn], axis=0))


_DIFFERENCES = """Of each MAD encoder and each other one: balanced accuracy of the first minus that
of the second, on the same tiles. An interval that holds 0 shows no difference.
"""


def _differences(results: Results, num_cases: int) -> list[str]:
    pairs = [
        (ours, other)
        for ours in results
        for other in results
        if ours.startswith("mad") and not other.startswith("mad")
    ]
    if not pairs:
        return []
    text = ["\n## Differences\n", _DIFFERENCES]
    for color in COLORS:
        rows = [_difference_row(results, *pair, color, num_cases) for pair in pairs]
        text += [f"\n{color.capitalize()}, same pixels at every scale:\n", _table(rows)]
    return text


def _difference_row(
    results: Results, ours: str, other: str, color: str, num_cases: int
) -> dict[str, object]:
    estimates = _matrix(results[ours], color) - _matrix(results[other], color)
    first, second = (
        _resampled(name, [result.probes[color].resampled for result in results[name]])
        for name in (ours, other)
    )
    drawn = first - second
    num_drawn = (len(results[ours]), len(results[other]), num_cases)
    places = {
        "coarse to fine": (0, -1),
        "fine to coarse": (-1, 0),
        "coarse to coarse": (0, 0),
        "fine to fine": (-1, -1),
    }
    row: dict[str, object] = {"encoder": ours, "minus": other}
    for title, (trained, tested) in places.items():
        value = float(estimates[trained, tested])
        row[title] = _with_interval(value, drawn[:, trained, tested], num_drawn, signed=True)
    return row


def _field_row(
    name: str, found: Sequence[EncoderResult], color: str, num_classes: int
) -> dict[str, object]:
    matrices = np.mean([result.field_probes[color].matrix for result in found], axis=0)
    ratios = retention(matrices, num_classes)
    return {
        "encoder": name,
        "coarse to coarse": matrices[0, 0],
        "coarse to fine": matrices[0, -1],
        "fine to fine": matrices[-1, -1],
        "retained": ratios.retained,
        "above chance": ratios.above_chance,
    }


def _other_row(
    name: str, found: Sequence[EncoderResult], color: str, num_cases: int
) -> dict[str, object]:
    segmentation = [result.segmentation[color] for result in found]
    first = float(np.mean([s.scores[0].mean_iou for s in segmentation]))
    last = float(np.mean([s.scores[-1].mean_iou for s in segmentation]))
    return {
        "encoder": name,
        "recall at 1": float(np.mean([result.retrieval[color].recall_at_1 for result in found])),
        "reciprocal rank": _with_interval(
            float(np.mean([result.retrieval[color].mean_reciprocal_rank for result in found])),
            _resampled(name, [result.retrieval[color].resampled for result in found]),
            (len(found), num_cases),
        ),
        "mIoU coarse": first,
        "mIoU fine": last,
        "retention": last / first if first else float("nan"),
        "consistency": float(np.mean([s.consistency for s in segmentation])),
        "kappa": float(np.mean([s.kappa for s in segmentation])),
        "boundary F1 fine": float(np.mean([s.scores[-1].boundary_f1 for s in segmentation])),
        "speckle fine": float(np.mean([s.scores[-1].speckle for s in segmentation])),
    }


def _with_interval(
    value: float, resampled: NDArray[np.float64], num_drawn: Sequence[int], *, signed: bool = False
) -> str:
    low, high = bootstrap_interval(resampled, num_drawn)
    form = "+.3f" if signed else ".3f"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _write_csv(path: Path, results: Results, settings: EvaluationSettings) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["encoder", "seed", "colour", "rule", "trained_at", "tested_at", "accuracy"]
        )
        for name, found in results.items():
            for seed, result in enumerate(found):
                for rule in ("probes", "field_probes"):
                    for color, probe in getattr(result, rule).items():
                        for (row, column), value in np.ndenumerate(probe.matrix):
                            scales = settings.scales[row], settings.scales[column]
                            kind = "same pixels" if rule == "probes" else "same field"
                            writer.writerow([name, seed, color, kind, *scales, f"{value:.4f}"])


def draw_retention(results: Results, settings: EvaluationSettings, path: Path) -> None:
    """Balanced accuracy over the tested scale, of probes trained at the coarsest."""
    figure = Figure(figsize=(9.0, 4.0), layout="constrained", dpi=120)
    panels = figure.subplots(1, len(COLORS), sharey=True)
    for axes, color in zip(panels, COLORS, strict=True):
        colors = (f"C{index}" for index in itertools.count() if index % 10 != _GREY)
        for name, found in results.items():
            is_random = name == "random"
            tint = "0.5" if is_random else next(colors)
            seeds = [result.probes[color].matrix[0] for result in found]
            places = range(len(seeds[0]))
            if len(seeds) > 1:
                low, high = np.min(seeds, axis=0), np.max(seeds, axis=0)
                axes.fill_between(places, low, high, color=tint, alpha=0.15, lw=0)
            style = "--" if is_random else "-"
            values = np.mean(seeds, axis=0)
            axes.plot(places, values, marker="o", label=name, color=tint, linestyle=style)
        axes.set_xticks(range(len(settings.scales)), [f"{s:g}" for s in settings.scales])
        axes.set_xlabel("um per pixel of the test tiles")
        axes.set_title(color)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("balanced accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path)
