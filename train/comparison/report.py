"""The report of a comparison: tables, figures, and fixed sentences that say how to read them.

REPORT/README.md                      all of it on one page
REPORT/table1.tex                     Dice and IoU of each class and method
REPORT/intervals.csv                  the same as numbers, and differences to the baseline
REPORT/bias.csv                       what Fig. 2 and 3 show, and the ablation's biases
REPORT/run.yaml                       what all rows share
REPORT/figure{2,3,4}.{pdf,png}        the figures of arXiv 2604.13479 by their numbers
"""

import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np

from serve.contract.markdown import markdown_table
from train.comparison.bootstrap import NUM_RESAMPLES, NUM_SEEDS_MIN, Bootstrap, Floats
from train.comparison.claim import claim_section
from train.comparison.compare import NUM_PANELS, PANEL_SHARE_MIN, Comparison
from train.comparison.figures import figures_section
from train.comparison.methods import BASELINE, COLD, DFA, FROZEN, UNET_LEARNING_RATE, Row, RowName
from train.comparison.run import RowResult
from train.comparison.tables import Table1, difference_table, mean_std, write_intervals
from train.config import write_settings
from train.data.folder import Split, TileFolder
from train.intervals import percentiles
from train.presets import PRESETS
from train.settings import Settings

_PAPER = "arXiv 2604.13479"
_CASES_MIN = 10
"""With fewer test cases, the report warns (our choice)."""


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Write the whole report; returns its README."""
    folder.mkdir(parents=True, exist_ok=True)
    bootstrap, table = Bootstrap(comparison), Table1(comparison)
    caption = f"Dice and IoU of the pooled test pixels, {_seeds_text(comparison)}"
    (folder / "table1.tex").write_text(table.latex(caption), encoding="utf-8")
    write_intervals(folder / "intervals.csv", comparison, bootstrap)
    write_settings(folder / "run.yaml", without_folders(comparison.settings))
    sections = [
        _introduction(comparison),
        _table_section(table),
        _difference_section(bootstrap),
        claim_section(bootstrap),
        _leverage_section(comparison),
        _times_section(comparison),
        figures_section(comparison, folder),
        _method(bootstrap),
        _reproduction(comparison),
    ]
    readme = folder / "README.md"
    readme.write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")
    return readme


def without_folders(settings: Settings) -> Settings:
    """The settings without this machine's folders: files by their name, the cache as CACHE."""
    weights, runtime = settings.weights, settings.runtime
    return replace(
        settings,
        weights=replace(
            weights,
            from_run=weights.from_run and Path(weights.from_run).name,
            sam_weights=weights.sam_weights and Path(weights.sam_weights).name,
            pathology_weights=weights.pathology_weights and Path(weights.pathology_weights).name,
        ),
        runtime=replace(runtime, embedding_cache=runtime.embedding_cache and "CACHE"),
    )


def _introduction(comparison: Comparison) -> str:
    settings, data = comparison.settings, comparison.data
    sizes = "; ".join(_size_text(data, split) for split in sorted(data.tiles))
    mpp = next(iter(comparison.results.values())).card.mpp
    scale = "an unknown scale" if mpp is None else f"{mpp:g} um per pixel"
    return (
        f"# Comparison on {data.root.resolve().name or settings.preset}\n\n"
        f"The methods of {_PAPER}, trained with the same settings: {len(comparison.rows)} rows, "
        f"{_seeds_text(comparison)}, {settings.optimization.epochs} epochs, tiles of "
        f"{settings.model.tile_size_px} pixels at {scale}, scored on the images' own grids "
        f"({sizes}). Data set SHA-256 `{comparison.fingerprint[:16]}`, {len(data.classes)} "
        f"classes.\n\nPreset `{settings.preset}`: {inspect.getdoc(PRESETS[settings.preset])}"
    )


def _size_text(data: TileFolder, split: Split) -> str:
    """`40 test images of 3 cases (A, B, C)`; without cases where folds.csv has no group."""
    tiles = data.tiles[split]
    groups = sorted({tile.group for tile in tiles if tile.group})
    if not groups:
        return f"{len(tiles)} {split}"
    listed = f" ({', '.join(groups)})" if len(groups) < _CASES_MIN else ""
    return f"{len(tiles)} {split} images of {len(groups)} cases{listed}"


def _seeds_text(comparison: Comparison) -> str:
    first, last = comparison.seeds[0], comparison.seeds[-1]
    return f"seed {first}" if first == last else f"seeds {first} to {last}"


def _table_section(table: Table1) -> str:
    published = f" The lines *published* are {_PAPER}, Table 1." if table.published else ""
    return (
        "## Table 1\n\nDice and IoU of all test pixels pooled, mean ± sample standard deviation "
        "over the seeds. Bold is the highest mean of a line, whatever the difference is worth."
        f"{published} Also as [LaTeX](table1.tex).\n\n{table.markdown()}"
    )


def _difference_section(bootstrap: Bootstrap) -> str:
    comparison = bootstrap.comparison
    smallest = comparison.smallest_difference
    frozen = (
        f"If {FROZEN.title} is not lower than {DFA.title}, nothing shows that the bias learns more "
        "than class frequency. "
        if comparison.row(FROZEN.name)
        else ""
    )
    return (
        "## Differences\n\n"
        + difference_table(bootstrap, _pairs(comparison))
        + f"\n\n*higher* and *lower* are said from {NUM_SEEDS_MIN} seeds on, where the interval "
        f"leaves out 0 and the difference is at least {smallest:g}, the smallest worth telling. "
        f"*equal* means that the whole interval is within {smallest:g} of 0; everything else is "
        f"*undecided*. {frozen}Each class and each seed is in [intervals.csv](intervals.csv)."
    )


def _leverage_section(comparison: Comparison) -> str:
    """How much each row's answers depend on its bias, averaged over seeds."""
    found = {row.title: _mean_leverage(comparison.of(row.name)) for row in comparison.rows}
    changes = list(dict.fromkeys(change for cells in found.values() for change in cells))
    if not changes:
        return ""
    lines = [
        [title, *(cells.get(change, "–") for change in changes)]
        for title, cells in found.items()
        if cells
    ]
    return (
        "## Leverage of the bias\n\n"
        + markdown_table(["Method", *changes], lines, align="lr")
        + "\n\nEach trained model is changed as the column says and tested again, without "
        "training: the share of the test labels that change, and the change in mean Dice. Where "
        "little changes, the model does not use its bias, and no score is due to it."
    )


def _mean_leverage(results: list[RowResult]) -> dict[str, str]:
    """Labels changed and the difference in mean Dice, averaged over seeds, by change."""
    cells = {}
    for index, entry in enumerate(results[0].leverage[1:], start=1):
        pairs = [(result.leverage[0], result.leverage[index]) for result in results]
        changed = np.mean([after.labels_changed for _, after in pairs])
        dice = np.mean([after.mean_dice - before.mean_dice for before, after in pairs])
        cells[entry.change] = f"{changed:.2%}, {dice:+.4f}"
    return cells


def _times_section(comparison: Comparison) -> str:
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


def _pairs(comparison: Comparison) -> list[tuple[Row, Row]]:
    """Every row against the baseline, then the paper's claims about DFA."""
    pairs = [(row, BASELINE) for row in comparison.rows if row.name != BASELINE.name]
    if comparison.row(DFA.name):
        others = [comparison.row(name) for name in ("hcfa", FROZEN.name, COLD.name)]
        pairs += [(DFA, other) for other in others if other is not None]
    return pairs


def _reproduction(comparison: Comparison) -> str:
    """One command, and the settings that it needs."""
    version = next(iter(comparison.results.values())).card.code_version
    rows = " ".join(row.name for row in comparison.rows)
    return f"""## How to reproduce it

```sh
python -m train compare --config run.yaml --data DATA --out OUT --seeds N --rows ROWS
```

With focalpath {version}; [run.yaml](run.yaml) has the settings. Here N was {len(comparison.seeds)},
and ROWS were {rows}. `settings.json` in DATA says what `python -m train prepare` made it from."""


def _method(bootstrap: Bootstrap) -> str:
    num_seeds, num_cases = bootstrap.num_drawn
    low, high = percentiles(bootstrap.num_drawn)
    panels = (
        f"- Fig. 4 shows up to {NUM_PANELS} images; a class counts from {PANEL_SHARE_MIN:.0%} of "
        "an image on."
        if bootstrap.comparison.with_pictures
        else ""
    )
    if num_cases < _CASES_MIN:
        panels = (
            f"- **{num_cases} test cases are few**: they say little about other patients, whatever "
            f"the interval.\n{panels}"
        )
    return f"""## How it was measured

- For each seed, all rows have the same data, order, augmentation, initial weights and number of
  epochs; only the bias and the focal loss differ, and the U-Net, where it takes part, is another
  network without an IoU head, with a learning rate of its own ({UNET_LEARNING_RATE:g}). The epoch
  with the best mean validation Dice is tested, once.
- HCFA uses the validation Dice of the {BASELINE.title} run of the same seed.
- Dice and IoU per class are those of all test pixels pooled. Unlabelled pixels count nowhere, nor
  does a class without a test pixel. The mean is the plain mean over classes.
- Intervals: a bootstrap of {NUM_RESAMPLES} resamples. Each draws {num_seeds} seeds and {num_cases}
  test cases with replacement, pools the cases' pixels, and averages Dice over the seeds; all rows
  see the same draws. A case is a patient or slide where folds.csv has a group, else an image. The
  bounds are the {low:.1%} and {high:.1%} percentiles, which are expanded for few seeds or cases
  (Hesterberg 2015, arXiv 1411.5279); of one class, the cases that have it count. Intervals cover
  other trainings and other test cases, but never reach beyond those that are there: where most of
  the spread is between 2, 3 or 5 seeds or cases, at most 50%, 75% or 94% of the intervals hold the
  true value. Nothing is corrected for the number of comparisons.
{panels}"""
