"""The Dice of a trained baseline, which some class biases use as the difficulty."""

from pathlib import Path

import torch
from torch import Tensor

from train.data.folder import TileFolder
from train.errors import BaselineError
from train.fitting.scores import check_classes
from train.model.checkpoint import read_card
from train.model.class_bias import STRATEGIES, find_strategy
from train.settings import Settings


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
    check_classes(card, f"the baseline {baseline}", folder)
    names = [f"dice/{entry.name}" for entry in folder.classes]
    if not card.metrics.keys() >= set(names):
        raise BaselineError(
            f"the baseline {baseline} has no validation Dice (was it imported with --no-score?), "
            f"and hcfa takes that for difficulty. Train one in another folder: {train_it}"
        )
    # NaN for an absent class, whose difficulty is not known.
    return torch.tensor([card.metrics[name] for name in names])
