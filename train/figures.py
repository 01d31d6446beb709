"""Figures of a training run."""

import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.settings import TissueClass

Row = dict[str, float]


def plot_training(metrics: Path, classes: Sequence[TissueClass], figure_path: Path) -> None:
    """Draw loss, validation Dice and the bias of each class over the epochs of `metrics` (CSV)."""
    epochs = _read_epochs(metrics)
    with matplotlib.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(12, 3.6), layout="constrained", dpi=120)
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
        loss_axes.legend(frameon=False)
        for entry in classes:
            _draw(dice_axes, epochs, f"validation/dice/{entry.name}", entry.name, entry.color)
            _draw(bias_axes, epochs, f"bias/{entry.name}", entry.name, entry.color)
        _draw(dice_axes, epochs, "validation/dice/mean", "mean", "black", linestyle="--")
        dice_axes.set(title="Validation Dice", xlabel="Epoch", ylim=(0, 1))
        bias_axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        bias_axes.set(title="Class attention bias", xlabel="Epoch")
        dice_axes.legend(frameon=False, ncols=2, loc="lower right")
        figure.savefig(figure_path)


def _draw(
    axes: Axes,
    epochs: Sequence[Row],
    name: str,
    label: str,
    color: str | None = None,
    linestyle: str = "-",
) -> None:
    points = [(row["epoch"] + 1, row[name]) for row in epochs if name in row]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, color=color, linestyle=linestyle)


def _read_epochs(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        ]
