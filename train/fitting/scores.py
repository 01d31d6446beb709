"""Scores of a checkpoint: on a split of a data set, and those that a run takes from a baseline."""

import math
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from train.console import warn
from train.data.folder import Split, TileFolder, read_tile_folder
from train.data.pixels import require_labelled
from train.data.scale import resolve_mpp
from train.errors import BaselineError
from train.fitting.evaluation import count_split
from train.fitting.task import named_scores
from train.metrics import class_scores
from train.model.checkpoint import CheckpointCard, check_classes, read_card
from train.model.class_bias import STRATEGIES, find_strategy
from train.model.segmenter import Segmenter
from train.settings import Settings


def evaluate(
    segmenter: Segmenter, card: CheckpointCard, data: Path, split: Split, *, tta: bool = False
) -> dict[str, float]:
    """Score a checkpoint on one split of a data set, whole images on their own grids.

    With `tta`, each tile's answer is the mean over its flips and quarter turns (test-time
    augmentation).

    Returns:
        Dice and IoU under names such as `dice/mean` and `iou/Tumor`.

    Raises:
        CheckpointError: the data set has other classes.
        DatasetError: the split has no labelled pixel.
        ScaleError: the um per pixel of some images are not known.
    """
    folder = read_tile_folder(data)
    check_classes(card, "the checkpoint", folder.classes)
    _check_scale(card, folder, split)
    require_labelled(folder, split)
    confusion = count_split(segmenter, card, folder, split, tta=tta)
    return named_scores(class_scores(confusion), card.classes)


@rank_zero_only
def print_scores(scores: dict[str, float], card: CheckpointCard, title: str) -> None:
    """Print a table of each class's pixel share, bias, Dice and IoU."""
    table = Table("Class", title=escape(title))
    for column in ("Pixel share", "Bias", "Dice", "IoU"):
        table.add_column(column, justify="right")
    rows = zip(card.classes, card.shares, card.class_attention_bias, strict=True)
    for entry, share, bias in rows:
        found = [scores[f"{metric}/{entry.name}"] for metric in ("dice", "iou")]
        cells = ["-" if math.isnan(score) else f"{score:.4f}" for score in found]
        known_share = "-" if math.isnan(share) else f"{share:.1%}"
        name = escape(entry.name)
        table.add_row(name, known_share, f"{bias:+.3f}", *cells)
    table.add_section()
    table.add_row("Mean", "", "", f"{scores['dice/mean']:.4f}", f"{scores['iou/mean']:.4f}")
    Console().print(table)


def baseline_dice(settings: Settings, baseline: Path | None, folder: TileFolder) -> Tensor | None:
    """Dice of each class (C,) that hcfa's baseline reached on its validation tiles."""
    if baseline is None:
        return None
    if not find_strategy(settings.model.bias).needs_baseline:
        users = [s.name for s in STRATEGIES.values() if s.needs_baseline]
        raise BaselineError(
            f"--difficulty-from is given, but --bias {settings.model.bias} uses no difficulty. "
            f"Leave it out, or choose --bias {' or '.join(users)}."
        )
    train_it = (
        f"`python -m train fit {settings.preset} --bias none --data {folder.root} --out {baseline}`"
    )
    if not baseline.exists():
        raise BaselineError(f"no baseline at {baseline}. Train it first: {train_it}")
    card = read_card(baseline)
    check_classes(card, f"the baseline {baseline}", folder.classes)
    names = [f"dice/{entry.name}" for entry in folder.classes]
    if not card.metrics.keys() >= set(names):
        raise BaselineError(
            f"the baseline {baseline} has no validation Dice (was it imported with --no-score?), "
            f"and hcfa takes that for difficulty. Train one in another folder: {train_it}"
        )
    # NaN for an absent class, whose difficulty is not known.
    return torch.tensor([card.metrics[name] for name in names])


def _check_scale(card: CheckpointCard, folder: TileFolder, split: Split) -> None:
    """Refuse images of unknown scale; warn of a checkpoint of version 0.1."""
    if not card.settings.model.squeeze:
        if card.mpp is not None:
            resolve_mpp(card.input_mpp, folder.mpp, folder.tiles[split])
        return
    side = card.settings.model.tile_size_px
    warn(
        f"this checkpoint is of version 0.1, which squeezed every image to {side} x {side} pixels, "
        f"and so are the images now. Its um per pixel ({card.mpp or 'unknown'}) is right only for "
        "images like those that it was trained on."
    )
