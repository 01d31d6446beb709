"""Figures of a training run, and the paper's figures (arXiv 2604.13479) from a comparison."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from train.fitting.metrics_file import read_metrics
from train.settings import LabelClass

NAMED_CLASSES_MAX = 30
"""Figures name at most this many classes. More names would leave no room for the data."""

_PAPER_STYLE: Any = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "pdf.fonttype": 42,  # text stays text
}
_UNLABELLED_COLOR = "#ffffff"
_LABEL_BACKGROUND = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.3}


@dataclass(frozen=True)
class Correlation:
    """Relation of two per-class quantities: fitted line, Pearson's r, Spearman's rho."""

    slope: float
    intercept: float
    pearson: float
    pearson_p: float
    spearman: float
    spearman_p: float


@dataclass(frozen=True)
class Panels:
    """One tile of Fig. 4: (H, W, 3) uint8 RGB, and label maps (H, W) in 0..C by name.

    The first label map is the ground truth.
    """

    image: NDArray[np.uint8]
    labels: dict[str, NDArray[Any]]


def plot_training(metrics: Path, classes: Sequence[LabelClass], figure_path: Path) -> None:
    """Draw loss, validation Dice and bias per class over the epochs of `metrics` (CSV)."""
    rows = read_metrics(metrics)
    epochs = [{name: float(value) for name, value in row.items() if value} for row in rows]
    with matplotlib.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(12, 4.2), layout="constrained", dpi=120)
        loss_axes, dice_axes, bias_axes = figure.subplots(1, 3)
        names = {
            "loss": "total",
            "dice_loss": "Dice",
            "focal_loss": "focal",
            "iou_loss": "IoU error",
        }
        for name, label in names.items():
            _draw(loss_axes, epochs, name, label=label)
        loss_axes.set(title="Training loss", xlabel="Epoch", yscale="log")
        _draw(loss_axes, epochs, "validation/loss", "validation, total", "tab:blue", "--")
        _legend_below(loss_axes)
        for entry in classes:
            shown = entry.name if len(classes) <= NAMED_CLASSES_MAX else None
            _draw(dice_axes, epochs, f"validation/dice/{entry.name}", shown, entry.color)
            _draw(bias_axes, epochs, f"bias/{entry.name}", shown, entry.color)
            _draw(bias_axes, epochs, f"bias_prior/{entry.name}", None, entry.color, ":")
        _draw(dice_axes, epochs, "validation/dice/mean", "mean", "black", linestyle="--")
        dice_axes.set(title="Validation Dice", xlabel="Epoch", ylim=(0, 1))
        bias_axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        bias_axes.set(title="Class attention bias (dotted: initial value)", xlabel="Epoch")
        _legend_below(dice_axes)
        figure.savefig(figure_path)


def _legend_below(axes: Axes) -> None:
    """Put the legend below the axes, where it covers no line."""
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def _draw(
    axes: Axes,
    epochs: Sequence[dict[str, float]],
    name: str,
    label: str | None,
    color: str | None = None,
    linestyle: str = "-",
) -> None:
    points = [(row["epoch"], row[name]) for row in epochs if name in row]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, color=color, linestyle=linestyle)


def plot_share_against_dice(
    classes: Sequence[LabelClass],
    shares: NDArray[np.float64],
    baseline_dice: NDArray[np.float64],
    path: Path,
) -> None:
    """Draw Fig. 2: each class's share of the labelled training pixels against the baseline's Dice.

    Args:
        classes: Names and colours.
        shares: (C,) in (0, 1].
        baseline_dice: (seeds, C) on the test tiles.
        path: The files' path without suffix; writes a PDF and a PNG.
    """
    with matplotlib.rc_context(_PAPER_STYLE):
        figure = Figure(figsize=(3.5, 2.8), layout="constrained")
        axes = figure.subplots()
        if shares.max() > 3 * shares.min():
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        axes.set(xlabel="Share of labelled training pixels", ylabel="Baseline Dice (test)")
        _scatter_classes(axes, classes, shares, baseline_dice)
        _save(figure, path)


def plot_bias(
    classes: Sequence[LabelClass],
    delta: NDArray[np.float64],
    prior: NDArray[np.float64],
    baseline_dice: NDArray[np.float64],
    correlation: Correlation | None,
    path: Path,
) -> None:
    """Draw Fig. 3: the learned bias per class, and the bias against the baseline's Dice.

    Args:
        classes: Names and colours.
        delta: (seeds, C) learned biases.
        prior: (C,) initial biases (Eq. 6).
        baseline_dice: (seeds, C) on the test tiles.
        correlation: Correlation of the means over seeds; None draws no line.
        path: The files' path without suffix; writes a PDF and a PNG.
    """
    with matplotlib.rc_context(_PAPER_STYLE):
        figure = Figure(figsize=(7, 2.8), layout="constrained")
        bars, scatter = figure.subplots(1, 2)
        _draw_bias_bars(bars, classes, delta, prior)
        scatter.set(xlabel="Baseline Dice (test)", ylabel=r"Learned bias $\delta_c$")
        scatter.set_title("b", loc="left", fontweight="bold")
        if correlation is not None:
            text = (
                f"Pearson r = {correlation.pearson:.2f} (p = {correlation.pearson_p:.2g}), "
                f"Spearman \u03c1 = {correlation.spearman:.2f}"
            )
            scatter.set_title(text.replace("-", "\u2212"), loc="right", fontsize=7)
        _scatter_classes(scatter, classes, baseline_dice.mean(axis=0), delta, line=correlation)
        _save(figure, path)


def plot_panels(classes: Sequence[LabelClass], tiles: Sequence[Panels], path: Path) -> None:
    """Draw Fig. 4, one row per tile: image, ground truth and each method's prediction."""
    titles = ["Image", *tiles[0].labels]
    colors = ListedColormap([_UNLABELLED_COLOR, *(entry.color for entry in classes)])
    with matplotlib.rc_context(_PAPER_STYLE):
        size = (1.05 * len(titles), len(tiles) + 0.55)
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.02, w_pad=0.02))
        grid = figure.subplots(len(tiles), len(titles), squeeze=False)
        for line, tile in zip(grid, tiles, strict=True):
            line[0].imshow(tile.image)
            for axes, labels in zip(line[1:], tile.labels.values(), strict=True):
                axes.imshow(labels, cmap=colors, vmin=0, vmax=len(classes), interpolation="nearest")
        for axes, title in zip(grid[0], titles, strict=True):
            axes.set_title(title, fontsize=8)
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(True)
            axes.spines[:].set(linewidth=0.4, color="0.5")
        if len(classes) <= NAMED_CLASSES_MAX:
            figure.legend(
                handles=_legend_patches(classes, tiles),
                loc="outside lower center",
                ncols=min(len(classes) + 1, len(titles)),
                frameon=False,
            )
        _save(figure, path)


def _draw_bias_bars(
    axes: Axes,
    classes: Sequence[LabelClass],
    delta: NDArray[np.float64],
    prior: NDArray[np.float64],
) -> None:
    """Draw the mean over seeds as a bar, each seed as a dot and the prior as a mark."""
    places = np.arange(len(classes))
    colors = [entry.color for entry in classes]
    means = delta.mean(axis=0)
    named = len(classes) <= NAMED_CLASSES_MAX
    edge: dict[str, Any] = {"edgecolor": "0.2", "linewidth": 0.6} if named else {}
    axes.barh(places, means, color=colors, height=0.6, **edge)
    axes.axvline(0, color="0.2", linewidth=0.6)
    axes.vlines(prior, places - 0.4, places + 0.4, color="black", linewidth=2, label="prior")
    dots: dict[str, Any] = {"color": "white", "mec": "black", "ms": 3.2, "mew": 0.7}
    for offset, values in zip(np.linspace(-0.15, 0.15, len(delta)), delta, strict=True):
        axes.plot(values, places + offset, "o", **dots)
    axes.plot([], [], "o", label="one seed", **dots)
    if named:
        axes.set_yticks(places, [entry.name for entry in classes])
    else:
        axes.set(yticks=[], ylabel=f"{len(classes)} classes")
    axes.invert_yaxis()
    axes.set(xlabel=r"Learned bias $\delta_c$")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.set_title("a", loc="left", fontweight="bold")
    axes.legend(frameon=False, fontsize=7, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))


def _scatter_classes(
    axes: Axes,
    classes: Sequence[LabelClass],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    line: Correlation | None = None,
) -> None:
    """Draw one named point per class at (x, mean of y); error bars span the seeds."""
    means = y.mean(axis=0)
    spread = [means - y.min(axis=0), y.max(axis=0) - means]
    axes.errorbar(x, means, yerr=spread, fmt="none", ecolor="0.4", elinewidth=0.8, zorder=2)
    colors = [entry.color for entry in classes]
    axes.scatter(x, means, s=34, c=colors, edgecolors="0.15", linewidths=0.7, zorder=3)
    axes.margins(x=0.15, y=0.12)
    axes.autoscale_view()
    if line is not None:
        ends = np.array(axes.get_xlim())
        fitted = line.intercept + line.slope * ends
        axes.plot(ends, fitted, color="0.5", linewidth=1, linestyle="--", zorder=1)
        axes.set_xlim(*ends)
    if len(classes) <= NAMED_CLASSES_MAX:
        _label_points(axes, [entry.name for entry in classes], np.column_stack([x, means]))


def _label_points(axes: Axes, names: Sequence[str], points: NDArray[np.float64]) -> None:
    """Write each name beside its point, on the side with the fewest overlaps."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # fixes the layout, and so the positions in pixels
    radius = 4 * figure.dpi / 72
    taken = [
        Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)
        for x, y in axes.transData.transform(points[~np.isnan(points).any(axis=1)])
    ]
    sides = [(6, 3, "left"), (6, -9, "left"), (-6, 3, "right"), (-6, -9, "right")]
    sides += [(0, 8, "center"), (0, -14, "center")]
    for name, point in zip(names, points, strict=True):
        if np.isnan(point).any():
            continue
        label = axes.annotate(name, tuple(point), xytext=(0, 0), textcoords="offset points")
        label.set(in_layout=False, zorder=2.5, bbox=_LABEL_BACKGROUND)
        costs = []
        for dx, dy, side in sides:
            label.set(position=(dx, dy), horizontalalignment=side)
            box = label.get_window_extent()
            outside = not (axes.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1)
            costs.append(sum(box.overlaps(other) for other in taken) + 10 * outside)
        dx, dy, side = sides[int(np.argmin(costs))]
        label.set(position=(dx, dy), horizontalalignment=side)
        taken.append(label.get_window_extent())


def _legend_patches(classes: Sequence[LabelClass], tiles: Sequence[Panels]) -> list[Patch]:
    style: dict[str, Any] = {"edgecolor": "0.5", "linewidth": 0.4}
    patches = [Patch(facecolor=entry.color, label=entry.name, **style) for entry in classes]
    if any((labels == 0).any() for tile in tiles for labels in tile.labels.values()):
        patches.append(Patch(facecolor=_UNLABELLED_COLOR, label="unlabelled", **style))
    return patches


def _save(figure: Figure, path: Path) -> None:
    """Write PATH.pdf and PATH.png. The same figure gives the same bytes."""
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    figure.savefig(path.with_suffix(".png"), dpi=200, metadata={"Software": None})
