"""Scores of a checkpoint on a split of a data set."""

import math
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from train.console import warn
from train.data.folder import Split, TileFolder, read_tile_folder
from train.data.pixels import require_labelled
from train.data.scale import resolve_mpp
from train.errors import CheckpointError
from train.fitting.evaluation import predict_split
from train.fitting.task import named_scores
from train.metrics import PooledConfusion, class_scores
from train.model.checkpoint import CheckpointCard
from train.model.segmenter import Segmenter


def evaluate(
    segmenter: Segmenter, card: CheckpointCard, data: Path, split: Split, *, tta: bool = False
) -> dict[str, float]:
    """Score a checkpoint on one split of a data set, whole images on their own grids.

    Args:
        segmenter: The model.
        card: What it is.
        data: A data set with its classes.
        split: Which images.
        tta: Average over the flips and quarter turns of each tile (test-time augmentation).

    Returns:
        Dice and IoU under names such as `dice/mean` and `iou/Tumor`.

    Raises:
        CheckpointError: the data set has other classes.
        DatasetError: the split has no labelled pixel.
        ScaleError: the um per pixel of some images are not known.
    """
    folder = read_tile_folder(data)
    check_classes(card, "the checkpoint", folder)
    _check_scale(card, folder, split)
    require_labelled(folder, split)
    confusion = PooledConfusion(len(card.classes))
    images = predict_split(segmenter, card, folder, split, tta=tta)
    for image in track(images, f"Scoring {split} images", total=len(folder.tiles[split])):
        confusion.update(image.predicted[None], image.labels[None])
    return named_scores(class_scores(confusion.compute()), card.classes)


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


def check_classes(card: CheckpointCard, described: str, folder: TileFolder) -> None:
    """Refuse a data set with other classes than the checkpoint's."""
    names = [entry.name for entry in folder.classes]
    found = [entry.name for entry in card.classes]
    if found != names:
        raise CheckpointError(
            f"{described} has the classes {', '.join(found)}; expected those of {folder.root}, "
            f"{', '.join(names)}, in their order. Take one that was trained on the same classes."
        )


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
