"""The report of a comparison: tables, figures, and what they show in plain sentences.

REPORT/README.md                      all of it on one page
REPORT/table1.{csv,md,tex}            Dice and IoU of each class and method
REPORT/intervals.csv                  Dice and differences to the baseline with bootstrap intervals
REPORT/bias.csv                       what Fig. 2 and 3 show, and the ablation's biases
REPORT/times.csv                      training time of every run
REPORT/settings.json                  what all rows share
REPORT/figure{2,3,4}.{pdf,png}        the figures of arXiv 2604.13479 by their numbers
"""

import json
from pathlib import Path

import numpy as np

from train.comparison.bootstrap import (
    CONFIDENCE,
    NUM_RESAMPLES,
    Bootstrap,
    Difference,
    seed_scores,
)
from train.comparison.compare import NUM_PANELS, PANEL_SHARE_MIN, Comparison
from train.comparison.figures import bias_finding, figures_section
from train.comparison.methods import BASELINE, RowName
from train.comparison.reproduce import commands, shareable
from train.comparison.tables import (
    Table1,
    difference_table,
    table_rows,
    write_intervals,
)
from train.comparison.times import times_section, write_times

_PAPER = "arXiv 2604.13479"


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Write the whole report; returns its README."""
    folder.mkdir(parents=True, exist_ok=True)
    bootstrap = Bootstrap(comparison)
    table = Table1(comparison)
    table.write_csv(folder / "table1.csv")
    (folder / "table1.md").write_text(table.markdown() + "\n", encoding="utf-8")
    (folder / "table1.tex").write_text(table.latex(_caption(comparison)), encoding="utf-8")
    write_intervals(folder / "intervals.csv", comparison, bootstrap)
    write_times(folder / "times.csv", comparison)
    settings = json.dumps(shareable(comparison.settings), indent=2, default=str)
    (folder / "settings.json").write_text(settings + "\n", encoding="utf-8")
    sections = [
        _introduction(comparison),
        "## What it shows\n\n" + "\n".join(f"- {text}" for text in findings(bootstrap)),
        f"## Table 1\n\n{_table_note(table)}\n\n{table.markdown()}",
        "## Differences to the baseline\n\n"
        + difference_table(bootstrap, table_rows(comparison), BASELINE.name)
        + "\n\nEach class is in [intervals.csv](intervals.csv).",
        _ablation(bootstrap),
        times_section(comparison),
        figures_section(comparison, folder),
        _method(comparison),
        _again(comparison),
    ]
    readme = folder / "README.md"
    readme.write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")
    return readme


def findings(bootstrap: Bootstrap) -> list[str]:
    """What the numbers show, a sentence each, whichever way they fall."""
    comparison = bootstrap.comparison
    texts = _spread_finding(comparison)
    if comparison.row("dfa"):
        texts.append(
            describe(
                bootstrap,
                ("dfa", BASELINE.name),
                higher="DFA beats the baseline here.",
                lower="DFA is worse than the baseline here.",
                undecided="DFA is not shown to beat the baseline here.",
            )
        )
    if comparison.row("dfa") and comparison.row("hcfa"):
        texts.append(
            describe(
                bootstrap,
                ("dfa", "hcfa"),
                higher="DFA beats HCFA, which needs a second training.",
                lower="HCFA, which needs a second training, beats DFA.",
                undecided="No difference between DFA and HCFA is shown.",
            )
        )
    texts += _ablation_findings(bootstrap)
    texts += _other_methods(bootstrap)
    texts += bias_finding(comparison)
    return texts


def _spread_finding(comparison: Comparison) -> list[str]:
    """Say where the seeds of one method lie further apart than the methods."""
    others = [row for row in comparison.rows if row.name != BASELINE.name]
    if len(comparison.seeds) < 2 or not others:
        return []
    dice = {row.name: seed_scores(comparison, row.name, "dice")[:, 0] for row in comparison.rows}
    spread = float(np.sqrt(np.mean([values.var(ddof=1) for values in dice.values()])))
    differences = {r.title: dice[r.name].mean() - dice[BASELINE.name].mean() for r in others}
    inside = [f"{title} {d:+.4f}" for title, d in differences.items() if abs(d) < spread]
    if not inside:
        return []
    which = "the methods do" if len(inside) == len(others) else "most methods do"
    if 2 * len(inside) <= len(others):
        which = "some methods do"
    return [
        f"**The seeds differ more than {which}.** Between the {len(comparison.seeds)} seeds of a "
        f"method, mean Dice has a standard deviation of {spread:.4f} (all rows pooled); smaller "
        f"than that are {len(inside)} of {len(others)} differences to {BASELINE.title}: "
        f"{', '.join(inside)}."
    ]


def _ablation_findings(bootstrap: Bootstrap) -> list[str]:
    comparison = bootstrap.comparison
    texts = []
    if comparison.row("dfa") and comparison.row("dfa_frozen"):
        texts.append(
            describe(
                bootstrap,
                ("dfa", "dfa_frozen"),
                higher="Learning the bias adds to its frequency prior here.",
                lower="Learning the bias is worse than keeping its frequency prior here, against "
                "the paper's claim.",
                undecided="Learning the bias is not shown to add anything to its frequency prior: "
                "this run does not support the claim that delta learns more than frequency.",
            )
        )
    if comparison.row("dfa") and comparison.row("dfa_cold"):
        texts.append(
            describe(
                bootstrap,
                ("dfa", "dfa_cold"),
                higher="The warm start is better than the cold one here.",
                lower="The cold start is better than the warm one here.",
                undecided="No difference between warm and cold start is shown.",
            )
        )
    return texts


def _other_methods(bootstrap: Bootstrap) -> list[str]:
    """The other methods of Table 1 against the baseline, in one sentence."""
    rows = [r for r in table_rows(bootstrap.comparison) if r.name not in (BASELINE.name, "dfa")]
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(bootstrap.differences(row.name)[0].verdict, []).append(row.title)
    words = {"higher": "better", "lower": "worse", "undecided": "not shown to differ"}
    parts = [f"{words[v]}: {', '.join(groups[v])}" for v in words if v in groups]
    return [f"The other methods against {BASELINE.title}: {'; '.join(parts)}."] if parts else []


def describe(
    bootstrap: Bootstrap, pair: tuple[RowName, RowName], *, higher: str, lower: str, undecided: str
) -> str:
    """Say the difference in mean Dice between two rows, and the conclusion that it allows."""
    first, second = (
        next(row.title for row in bootstrap.comparison.rows if row.name == name) for name in pair
    )
    values = [bootstrap.dice(name)[0].estimate for name in pair]
    difference = bootstrap.differences(*pair)[0]
    conclusion = {"higher": higher, "lower": lower, "undecided": undecided}[difference.verdict]
    return (
        f"**{conclusion}** Mean Dice of {first} {values[0]:.4f}, of {second} {values[1]:.4f}: "
        f"{_evidence(difference)}."
    )


def _evidence(difference: Difference) -> str:
    interval, num_seeds = difference.interval, len(difference.per_seed)
    text = (
        f"difference {interval.estimate:+.4f}, {CONFIDENCE:.0%} interval over test tiles "
        f"[{interval.low:+.4f}, {interval.high:+.4f}]"
    )
    apart = not interval.low <= 0 <= interval.high
    text += ", which leaves out 0" if apart else ", which contains 0"
    if num_seeds == 1:
        return f"{text}; one seed was trained, so how much trainings differ is unknown"
    text += f"; positive in {difference.num_higher} of {num_seeds} seeds"
    return f"{text}, so the seeds disagree" if apart and difference.verdict == "undecided" else text


def _introduction(comparison: Comparison) -> str:
    settings, data = comparison.settings, comparison.data
    sizes = ", ".join(f"{len(data.tiles[split])} {split}" for split in sorted(data.tiles))
    text = (
        f"# Comparison on {settings.preset}\n\n"
        f"The methods of {_PAPER}, trained alike: {len(comparison.rows)} rows, "
        f"{_seeds_text(comparison)} each, {settings.optimization.epochs} epochs, tiles of "
        f"{settings.model.tile_size_px} pixels, scored at "
        f"{settings.model.score_size_px or settings.model.tile_size_px} ({sizes}). "
        f"Data set SHA-256 `{comparison.fingerprint[:16]}`, [settings](settings.json). "
        f"Written by `python -m train compare {settings.preset}`; the sentences below are "
        "computed from the numbers."
    )
    if settings.preset == "synthetic":
        text += (
            "\n\nThese tiles are drawn by a program and the encoders are small and trained from "
            "scratch. The numbers show what the methods do on this data, and say nothing about "
            "real tissue."
        )
    return text


def _seeds_text(comparison: Comparison) -> str:
    first, last = comparison.seeds[0], comparison.seeds[-1]
    return f"seed {first}" if first == last else f"seeds {first} to {last}"


def _caption(comparison: Comparison) -> str:
    text = f"Dice and IoU of the pooled test pixels ({comparison.settings.preset})"
    if len(comparison.seeds) > 1:
        text += f", mean and standard deviation over {len(comparison.seeds)} seeds"
    return f"{text}. The highest mean of a line is bold."


def _table_note(table: Table1) -> str:
    text = "Dice and IoU of all test pixels pooled, "
    text += (
        f"mean ± sample standard deviation over {table.num_seeds} seeds"
        if table.num_seeds > 1
        else "one seed"
    )
    text += ". Bold is the highest mean of a line, whether or not the difference is shown below."
    if table.published:
        text += f" In italics: {_PAPER}, Table 1."
    return text + " Also as [CSV](table1.csv), [Markdown](table1.md) and [LaTeX](table1.tex)."


def _ablation(bootstrap: Bootstrap) -> str:
    """DFA warm, cold and frozen at its prior."""
    comparison = bootstrap.comparison
    rows = [r for r in comparison.rows if r.name in (BASELINE.name, "dfa", "dfa_cold")]
    rows += [r for r in comparison.rows if r.name == "dfa_frozen"]
    if not comparison.row("dfa") or len(rows) < 3:
        return ""
    return (
        "## Ablation: warm, cold, frozen\n\n"
        "DFA from its prior (warm), from zero (cold), and kept at its prior (frozen). If frozen "
        "scores as well as learned, delta adds nothing to class frequency; the first section says "
        "what the numbers allow.\n\n" + difference_table(bootstrap, rows, "dfa")
    )


def _again(comparison: Comparison) -> str:
    """The commands that make this again."""
    version = next(iter(comparison.results.values())).card.code_version
    lines = "\n".join(commands(comparison))
    return (
        f"## How to make it again\n\n```sh\n{lines}\n```\n\nWith focalpath {version}. DATA and "
        "OUT are folders of yours. `python -m train compare` writes this page and its files, and "
        "nothing in them is edited by hand."
    )


def _method(comparison: Comparison) -> str:
    num_tiles, num_seeds = len(comparison.data.tiles["test"]), len(comparison.seeds)
    tail = (1 - CONFIDENCE) / 2
    return f"""## How it was measured

- Every row has the same data, order, augmentation, initial weights and number of epochs for a seed;
  only bias and focal loss differ. The epoch with the best mean validation Dice is tested, once.
- HCFA takes the validation Dice of the {BASELINE.title} run of the same seed.
- Dice and IoU per class are those of all test pixels pooled; unlabelled pixels count nowhere; the
  mean is the plain mean over classes.
- Intervals: paired bootstrap over the {num_tiles} test tiles. {NUM_RESAMPLES} times, {num_tiles}
  tiles are drawn with replacement, their confusion matrices added up, Dice computed for each seed
  and averaged over the {num_seeds} seed{"s" * (num_seeds > 1)}; all rows and seeds see the same
  draws, and a difference is taken within a draw. The bounds are the {tail:.1%} and {1 - tail:.1%}
  percentiles. They cover the choice of tiles, not another training: that is what the seeds show.
  Nothing is corrected for the number of comparisons.
- *higher* and *lower* are said only where the interval leaves out 0 and every seed agrees; all
  else is *undecided*.
- Fig. 4 shows up to {NUM_PANELS} tiles; a class counts from {PANEL_SHARE_MIN:.0%} of a tile on."""
