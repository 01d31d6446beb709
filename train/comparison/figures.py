"""The report's figures (arXiv 2604.13479, Fig. 2 to 4), and their correlations in words."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import stats

from train.comparison.bootstrap import Floats, seed_scores
from train.comparison.compare import Comparison
from train.comparison.methods import BASELINE, RowName
from train.comparison.tables import markdown_table, table_rows, write_bias_csv
from train.data.dataset import evaluation_tiles
from train.fitting.curves import (
    NAMED_CLASSES_MAX,
    Correlation,
    Panels,
    plot_bias,
    plot_panels,
    plot_share_against_dice,
)
from train.model.class_bias import ClassStatistics, centred_prior


def figures_section(comparison: Comparison, folder: Path) -> str:
    """Draw the figures and the table of biases; returns their section."""
    classes = comparison.data.classes
    baseline = seed_scores(comparison, BASELINE.name, "dice")[:, 1:]
    shares = np.array(comparison.of(BASELINE.name)[0].card.shares)
    plot_share_against_dice(classes, shares, baseline, folder / "figure2")
    parts = [
        "## Figures\n\n![Pixel share against baseline Dice](figure2.png)\n\n"
        f"Fig. 2: share of the labelled training pixels against the test Dice of {BASELINE.title}; "
        f"bars span the seeds. {_correlation_text(np.log(shares), baseline.mean(axis=0))} "
        "(of the logarithm of the share). [PDF](figure2.pdf)"
    ]
    deltas, prior = learned_biases(comparison), _prior(comparison)
    write_bias_csv(folder / "bias.csv", comparison, baseline, prior, deltas)
    if "dfa" in deltas:
        correlation = correlate(baseline.mean(axis=0), deltas["dfa"].mean(axis=0))
        plot_bias(classes, deltas["dfa"], prior, baseline, correlation, folder / "figure3")
        parts.append(_bias_text(baseline.mean(axis=0), prior, deltas))
    plot_panels(classes, _panels(comparison), folder / "figure4")
    parts.append(
        "![Panels of held-out tiles](figure4.png)\n\n"
        f"Fig. 4: the {len(comparison.panels)} test tiles with the most classes, chosen by their "
        f"masks before any prediction; predictions of seed {comparison.seeds[0]}. "
        "[PDF](figure4.pdf)"
    )
    if len(classes) > NAMED_CLASSES_MAX:
        parts.append(
            f"With {len(classes)} classes the figures name none (up to {NAMED_CLASSES_MAX} are "
            "named): [bias.csv](bias.csv) has the numbers by name, in the figures' order."
        )
    return "\n\n".join(parts)


def learned_biases(comparison: Comparison) -> dict[RowName, Floats]:
    """Biases after training, (seeds, C), of the rows that learn them."""
    return {
        row.name: np.array([result.card.class_attention_bias for result in comparison.of(row.name)])
        for row in comparison.rows
        if row.learns_bias
    }


def _prior(comparison: Comparison) -> Floats:
    """Where the warm start begins, (C,)."""
    shares = torch.tensor(comparison.of(BASELINE.name)[0].card.shares)
    warm = replace(comparison.settings.bias, bias_init="warm")
    return centred_prior(warm, ClassStatistics(shares)).double().numpy()


def bias_finding(comparison: Comparison) -> list[str]:
    """How the learned bias and its prior go with the baseline's Dice, in a sentence."""
    deltas, prior = learned_biases(comparison), _prior(comparison)
    if "dfa" not in deltas:
        return []
    delta = deltas["dfa"].mean(axis=0)
    dice = seed_scores(comparison, BASELINE.name, "dice")[:, 1:].mean(axis=0)
    moved = np.abs(delta - prior).max()
    text = f"Training moved no class's bias by more than {moved:.3f} from its prior"
    found = [correlate(dice, values) for values in (delta, prior, delta - prior)]
    if None in found:
        return [f"{text}; its correlation with the baseline's Dice is not defined."]
    learned, before, added = (f"{c.pearson:+.2f} (p = {c.pearson_p:.2g})" for c in found if c)
    return [
        f"{text}. Pearson's r with the baseline's Dice, over {len(prior)} classes: learned bias "
        f"{learned}, its prior {before}, what training added {added}. Only a negative r of what "
        "was added says that training gave hard classes more."
    ]


def _bias_text(baseline: Floats, prior: Floats, deltas: dict[RowName, Floats]) -> str:
    """Fig. 3, and how much of its correlation the prior already has."""
    quantities = {"learned bias (warm)": deltas["dfa"].mean(axis=0), "its prior": prior}
    quantities["learned minus prior"] = deltas["dfa"].mean(axis=0) - prior
    if "dfa_cold" in deltas:
        quantities["learned bias (cold)"] = deltas["dfa_cold"].mean(axis=0)
    lines = [[name, *_correlation_cells(values, baseline)] for name, values in quantities.items()]
    return (
        "![Learned bias of each class, and against baseline Dice](figure3.png)\n\n"
        "Fig. 3: a, the learned bias of each class, where it started, and each seed; b, the bias "
        "against the baseline's test Dice, with the fitted line. A negative correlation means that "
        "hard classes get a larger bias. What the prior already has is not learned:\n\n"
        + markdown_table(["Against baseline Dice", "Pearson r (p)", "Spearman ρ (p)"], lines)
        + f"\n\nOver {len(baseline)} classes, means over seeds, so p is rough. "
        "The numbers: [bias.csv](bias.csv). [PDF](figure3.pdf)"
    )


def correlate(x: Floats, y: Floats) -> Correlation | None:
    """Line and correlations of y on x; None where they are not defined or say nothing.

    Two points always lie on a line; of values that are all the same there is no correlation.
    """
    if len(x) < 3 or np.isnan(x).any() or np.ptp(x) < 1e-9 or np.ptp(y) < 1e-9:
        return None
    line, rank = stats.linregress(x, y), stats.spearmanr(x, y)
    return Correlation(
        slope=float(line.slope),
        intercept=float(line.intercept),
        pearson=float(line.rvalue),
        pearson_p=float(line.pvalue),
        spearman=float(rank.statistic),
        spearman_p=float(rank.pvalue),
    )


def _correlation_cells(values: Floats, baseline: Floats) -> tuple[str, str]:
    found = correlate(baseline, values)
    if found is None:
        return "–", "–"
    return (
        f"{found.pearson:+.2f} ({found.pearson_p:.2g})",
        f"{found.spearman:+.2f} ({found.spearman_p:.2g})",
    )


def _correlation_text(x: Floats, y: Floats) -> str:
    found = correlate(x, y)
    if found is None:
        return "No correlation is defined: too few classes, or all the same"
    return (
        f"Pearson r = {found.pearson:.2f} (p = {found.pearson_p:.2g}), "
        f"Spearman ρ = {found.spearman:.2f} (p = {found.spearman_p:.2g})"
    )


def _panels(comparison: Comparison) -> list[Panels]:
    """Image, ground truth and the first seed's predictions."""
    folder = replace(comparison.data, tiles={**comparison.data.tiles, "test": comparison.panels})
    tiles = evaluation_tiles(folder, "test", comparison.settings)
    seed = comparison.seeds[0]
    panels = []
    for index in range(len(tiles)):
        sample = tiles[index]
        labels = {"Ground truth": sample["labels"].numpy()}
        for row in table_rows(comparison):
            path = comparison.results[row.name, seed].panels / f"{sample['tile_id']}.png"
            with Image.open(path) as picture:
                labels[row.title] = np.asarray(picture)
        panels.append(Panels(sample["image"].permute(1, 2, 0).numpy(), labels))
    return panels
