"""How much a model's answers depend on its class bias, and on the attention with that bias.

A bias can be learned and still do nothing. So each part is taken away in turn, and what changes is
counted: labels, and Dice. Nothing is trained again, so a small change says that this model does not
use the part, and not that a model trained without it would be as good.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from train.data.dataset import WholeImageDataset
from train.data.folder import Split, TileFolder
from train.fitting.evaluation import scale_of
from train.fitting.loading import whole_image_loader
from train.metrics import PooledConfusion, class_scores
from train.model.checkpoint import CheckpointCard
from train.model.class_bias import ClassAttentionBias, ClassStatistics, find_strategy
from train.model.segmenter import Segmenter, encode_for_training, labels_from_logits

Change = Callable[[Segmenter], AbstractContextManager[object]]
AS_TRAINED = "as trained"
CAPTION = "Counted on tiles at the model's um per pixel. Nothing is trained again."


@dataclass(frozen=True, kw_only=True)
class Leverage:
    """What a change of the model changes in its answers."""

    change: str
    labels_changed: float
    """Share of the labelled pixels that get another label, in [0, 1]."""
    mean_dice: float
    dice_changes: tuple[float, ...]
    """Dice of each class minus that of the model as trained; NaN for a class that is absent."""


@torch.inference_mode()
def measure_leverage(
    segmenter: Segmenter, card: CheckpointCard, folder: TileFolder, split: Split
) -> list[Leverage]:
    """Change the class bias and its attention, and compare with the model as trained.

    Images are encoded once, and their tiles are decoded and scored with each change, at the model's
    own um per pixel.

    The model is left as it was.

    Returns:
        The model as trained, then one entry per change.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    segmenter = segmenter.to(device).eval()
    changes: dict[str, Change] = {AS_TRAINED: nullcontext, **_changes(segmenter, card)}
    confusions = {name: PooledConfusion(len(card.classes)).to(device) for name in changes}
    changed = dict.fromkeys(changes, 0)
    num_labelled = 0
    for features, labels in _tiles(segmenter, card, folder, split, device):
        labelled = labels > 0
        num_labelled += int(labelled.sum())
        trained = None
        for name, change in changes.items():
            with change(segmenter):
                logits = segmenter.decode(features).low_res_logits
            predicted = labels_from_logits(logits, labels.shape[-1])
            trained = predicted if trained is None else trained
            changed[name] += int(((predicted != trained) & labelled).sum())
            confusions[name].update(predicted, labels)
    scores = {name: class_scores(confusion.compute()) for name, confusion in confusions.items()}
    return [
        Leverage(
            change=name,
            labels_changed=changed[name] / max(num_labelled, 1),
            mean_dice=found.mean_dice,
            dice_changes=tuple((found.dice - scores[AS_TRAINED].dice).tolist()),
        )
        for name, found in scores.items()
    ]


def print_leverage(found: Sequence[Leverage]) -> None:
    """Print a table of the changes."""
    table = Table("Change", title="What the class bias does", caption=CAPTION)
    table.add_column("Labels changed", justify="right")
    table.add_column("Mean Dice", justify="right")
    trained = found[0].mean_dice
    for entry in found:
        difference = "" if entry is found[0] else f" ({entry.mean_dice - trained:+.4f})"
        table.add_row(
            entry.change, f"{entry.labels_changed:.2%}", f"{entry.mean_dice:.4f}{difference}"
        )
    Console().print(table)


def _tiles(
    segmenter: Segmenter,
    card: CheckpointCard,
    folder: TileFolder,
    split: Split,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features (B, D, T/16, T/16) and labels (B, T, T) int64 of the tiles that cover the images."""
    settings = card.settings
    batch_size = settings.optimization.batch_size
    dataset = WholeImageDataset(folder.tiles[split], len(card.classes), scale_of(card))
    for images in whole_image_loader(dataset, batch_size, settings.augmentation.num_workers):
        tiles = torch.cat([image["tiles"] for image in images])
        labels = torch.cat([image["tile_labels"] for image in images])
        for some, of_them in zip(
            torch.split(tiles, batch_size), torch.split(labels, batch_size), strict=True
        ):
            features = encode_for_training(
                segmenter, some.to(device), mixed_precision=settings.mixed_precision
            )
            yield features, of_them.to(device).long()


def _changes(segmenter: Segmenter, card: CheckpointCard) -> dict[str, Change]:
    """The changes that apply to the model's strategy."""
    bias, strategy = segmenter.class_attention_bias, find_strategy(card.settings.model.bias)
    changes: dict[str, Change] = {}
    if any(parameter.any() for parameter in bias.parameters()):
        changes["bias removed"] = lambda s: _scaled(s, 0.0)
        changes["bias inverted"] = lambda s: _scaled(s, -1.0)
    if strategy.learned and card.pixel_frequencies:
        statistics = ClassStatistics(torch.tensor(card.pixel_frequencies))
        prior = strategy.initial(card.settings.bias, statistics).to(bias.delta.device)
        changes["bias at its prior"] = lambda s: _started(s, prior)
    if segmenter.image_to_token_attentions:
        changes["attention averaged over pixels"] = attention_averaged
    return changes


@contextmanager
def _scaled(segmenter: Segmenter, factor: float) -> Iterator[None]:
    """Multiply all that the strategy learned; at 0 a temperature is 1."""
    with _restored(segmenter.class_attention_bias) as bias:
        for parameter in bias.parameters():
            parameter.mul_(factor)
        yield


@contextmanager
def _started(segmenter: Segmenter, prior: Tensor) -> Iterator[None]:
    """Put the bias where training started."""
    with _restored(segmenter.class_attention_bias) as bias:
        for parameter in bias.parameters():
            parameter.zero_()
        bias.delta.copy_(prior.expand_as(bias.delta))
        yield


@contextmanager
def _restored(bias: ClassAttentionBias) -> Iterator[ClassAttentionBias]:
    before = {name: value.clone() for name, value in bias.state_dict().items()}
    try:
        yield bias
    finally:
        bias.load_state_dict(before)


@contextmanager
def attention_averaged(segmenter: Segmenter) -> Iterator[None]:
    """Give every pixel the mean of what the image-to-token attention gives to the pixels."""
    hooks = [
        attention.register_forward_hook(
            lambda module, inputs, output: output.mean(dim=1, keepdim=True).expand_as(output)
        )
        for attention in segmenter.image_to_token_attentions
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
