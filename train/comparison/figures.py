"""The report's figures (arXiv 2604.13479, Fig. 2 to 4), and their correlations in words."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import stats

from serve.contract.markdown import markdown_table
from train.comparison.bootstrap import Floats, seed_scores
from train.comparison.compare import Comparison
from train.comparison.methods import BASELINE, RowName
from train.comparison.tables import table_rows, write_bias_csv
from train.data.images import read_image
from train.data.pixels import read_labels
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
    pearson, spearman = _correlation_cells(np.log(shares), baseline.mean(axis=0))
    parts = [
        "## Figures\n\n![Pixel share against baseline Dice](figure2.png)\n\n"
        f"Fig. 2: share of the labelled training pixels against the test Dice of {BASELINE.title}; "
        f"bars span the seeds. With the logarithm of the share, Pearson r (p) is {pearson}, "
        f"Spearman ρ (p) {spearman}. [PDF](figure2.pdf)"
    ]
    deltas, prior = learned_biases(comparison), _prior(comparison)
    write_bias_csv(folder / "bias.csv", comparison, baseline, prior, deltas)
    if "dfa" in deltas:
        correlation = correlate(baseline.mean(axis=0), deltas["dfa"].mean(axis=0))
        plot_bias(classes, deltas["dfa"], prior, baseline, correlation, folder / "figure3")
        warm = {row.name for row in comparison.rows if not row.changed("bias", "bias_init")}
        parts.append(_bias_text(baseline.mean(axis=0), prior, deltas, warm))
    if comparison.with_pictures:
        plot_panels(classes, _panels(comparison), folder / "figure4")
        parts.append(
            "![Panels of held-out tiles](figure4.png)\n\n"
            f"Fig. 4: the {len(comparison.panels)} test tiles with the most classes, chosen by "
            f"their masks before any prediction; predictions of seed {comparison.seeds[0]}. "
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


def _bias_text(
    baseline: Floats, prior: Floats, deltas: dict[RowName, Floats], warm: set[RowName]
) -> str:
    """Fig. 3, and how much of its correlation the prior of the `warm` rows already has."""
    quantities = {"prior": prior}
    for name, delta in deltas.items():
        quantities[f"{name}, learned"] = delta.mean(axis=0)
        if name in warm:
            quantities[f"{name}, learned minus prior"] = delta.mean(axis=0) - prior
    lines = [
        [name, f"{np.abs(values).max():.3f}", *_correlation_cells(values, baseline)]
        for name, values in quantities.items()
    ]
    header = ["Bias", "Largest", "Pearson r with baseline Dice (p)", "Spearman ρ (p)"]
    return (
        "![Learned bias of each class, and against baseline Dice](figure3.png)\n\n"
        "Fig. 3: a, the learned bias of each class, its start, and each seed; b, the bias "
        "against the baseline's test Dice. A negative correlation means that hard classes get a "
        "larger bias. Only a negative one of what was learned beyond the prior says that training "
        "gave hard classes more.\n\n"
        + markdown_table(header, lines, align="lr")
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


def _panels(comparison: Comparison) -> list[Panels]:
    """Image, ground truth and the first seed's predictions."""
    seed = comparison.seeds[0]
    panels = []
    for tile in comparison.panels:
        mask = read_labels(tile, len(comparison.data.classes))
        labels = {"Ground truth": mask}
        for row in table_rows(comparison):
            path = comparison.results[row.name, seed].panels / f"{tile.tile_id}.png"
            with Image.open(path) as picture:
                labels[row.title] = np.asarray(picture)
        panels.append(Panels(read_image(tile.image), labels))
    return panels
