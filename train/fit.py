"""A training run, from a folder of tiles to a checkpoint, and the evaluation of one.

RUN/model.safetensors, model.json   the checkpoint of the best validation Dice
RUN/last.ckpt                       Lightning's state, to resume from
RUN/metrics.csv                     losses, scores and biases of every epoch
RUN/training.png                    the same as a figure
"""

import logging
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from train.checkpoint import CARD_FILE, WEIGHTS_FILE, CheckpointCard, save_checkpoint
from train.dataset import (
    EpochSampler,
    Sample,
    Split,
    TileDataset,
    TileFolder,
    class_frequencies,
    count_pixels,
    read_tile_folder,
)
from train.figures import plot_training
from train.focal_attention import initial_bias
from train.segmenter import Segmenter
from train.settings import Settings
from train.task import SegmentationTask

METRICS_FILE = "metrics.csv"
FIGURE_FILE = "training.png"

# Lightning's own use of torch, and its advice on workers, which the settings decide.
_WARNINGS_OF_OTHERS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    "The .* does not have many workers",
    "Checkpoint directory .* exists and is not empty",
    "Experiment logs directory .* exists and is not empty",
)


def fit(settings: Settings, data: Path, run: Path, *, resume: bool = False) -> CheckpointCard:
    """Train on a data set and write the run's folder.

    Args:
        settings: The whole configuration.
        data: A data set in SAM-Path's layout.
        run: The folder to write; what an earlier run left there is replaced, unless resumed.
        resume: Continue from `run/last.ckpt`.

    Returns:
        The card of the best checkpoint.

    Raises:
        FocalPathError: the data, the settings or the loss cannot be used.
    """
    folder = read_tile_folder(data)
    frequencies = class_frequencies(folder)
    count_pixels(folder, "validation")
    L.seed_everything(settings.optimization.seed, workers=True, verbose=False)
    segmenter = Segmenter(settings, initial_bias(settings.bias, frequencies))
    task = SegmentationTask(segmenter, settings, folder.classes)
    card = partial(
        CheckpointCard,
        settings=settings,
        classes=folder.classes,
        mpp=folder.mpp,
        pixel_frequencies=tuple(frequencies.tolist()),
    )
    last = run / "last.ckpt"
    if not resume:
        for name in (WEIGHTS_FILE, CARD_FILE, METRICS_FILE, FIGURE_FILE, last.name):
            (run / name).unlink(missing_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    best = _BestCheckpoint(run, card)
    trainer = _trainer(
        settings,
        run,
        [
            best,
            ModelCheckpoint(dirpath=run, filename="last", enable_version_counter=False),
            RichProgressBar(leave=False),
        ],
    )
    trainer.fit(
        task,
        _training_loader(folder, settings),
        _evaluation_loader(folder, "validation", settings),
        ckpt_path=last if resume and last.is_file() else None,
    )
    plot_training(run / METRICS_FILE, folder.classes, run / FIGURE_FILE)
    assert best.card is not None, "validation runs after every epoch"
    return best.card


def evaluate(
    segmenter: Segmenter, card: CheckpointCard, data: Path, split: Split
) -> dict[str, float]:
    """Score a checkpoint on one split of a data set.

    Returns:
        Dice and IoU under names such as `dice/mean` and `iou/Tumor`.
    """
    folder = read_tile_folder(data)
    count_pixels(folder, split)
    task = SegmentationTask(segmenter, card.settings, card.classes)
    trainer = _trainer(card.settings, None, [RichProgressBar(leave=False)])
    loader = _evaluation_loader(folder, split, card.settings)
    trainer.test(task, loader, verbose=False)
    return {
        name.removeprefix("test/"): float(value) for name, value in trainer.callback_metrics.items()
    }


def print_scores(scores: dict[str, float], card: CheckpointCard, title: str) -> None:
    """Print a table of each class's pixel share, bias, Dice and IoU."""
    table = Table("Class", title=title)
    for column in ("Pixel share", "Bias", "Dice", "IoU"):
        table.add_column(column, justify="right")
    rows = zip(card.classes, card.pixel_frequencies, card.class_attention_bias, strict=True)
    for entry, share, bias in rows:
        dice, iou = scores[f"dice/{entry.name}"], scores[f"iou/{entry.name}"]
        table.add_row(entry.name, f"{share:.1%}", f"{bias:+.3f}", f"{dice:.4f}", f"{iou:.4f}")
    table.add_section()
    table.add_row("Mean", "", "", f"{scores['dice/mean']:.4f}", f"{scores['iou/mean']:.4f}")
    Console().print(table)


class _BestCheckpoint(Callback):
    """Writes the checkpoint whenever the mean validation Dice is the best so far."""

    def __init__(self, run: Path, card: "partial[CheckpointCard]") -> None:
        self.run = run
        self.card: CheckpointCard | None = None
        self._make_card = card
        self._best_dice = -1.0

    def on_validation_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        assert isinstance(task, SegmentationTask)
        scores = {
            name.removeprefix("validation/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("validation/")
        }
        if trainer.sanity_checking or scores["dice/mean"] <= self._best_dice:
            return
        self._best_dice = scores["dice/mean"]
        bias = task.segmenter.class_attention_bias.delta.detach().tolist()
        self.card = self._make_card(class_attention_bias=tuple(bias), metrics=scores)
        if trainer.is_global_zero:
            save_checkpoint(self.run, task.segmenter, self.card)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {"best_dice": self._best_dice}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best Dice of the run that is resumed."""
        self._best_dice = state_dict["best_dice"]


def _trainer(settings: Settings, run: Path | None, callbacks: list[Callback]) -> L.Trainer:
    optimization = settings.optimization
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in _WARNINGS_OF_OTHERS:
        warnings.filterwarnings("ignore", message=message)
    return L.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=optimization.epochs,
        precision=optimization.precision,
        accumulate_grad_batches=optimization.accumulate_batches,
        gradient_clip_val=optimization.gradient_clip,
        logger=CSVLogger(run, name="", version="") if run else False,
        callbacks=callbacks,
        enable_checkpointing=run is not None,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        default_root_dir=run,
    )


def _training_loader(folder: TileFolder, settings: Settings) -> DataLoader[Sample]:
    optimization, augmentation = settings.optimization, settings.augmentation
    tiles = folder.tiles["training"]
    return DataLoader(
        TileDataset(
            tiles,
            len(folder.classes),
            settings.model.tile_size_px,
            augmentation,
            seed=optimization.seed,
        ),
        batch_size=optimization.batch_size,
        sampler=EpochSampler(len(tiles), optimization.seed),
        drop_last=len(tiles) >= optimization.batch_size,
        num_workers=augmentation.num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def _evaluation_loader(folder: TileFolder, split: Split, settings: Settings) -> DataLoader[Sample]:
    return DataLoader(
        TileDataset(folder.tiles[split], len(folder.classes), settings.model.tile_size_px),
        batch_size=settings.optimization.batch_size,
        num_workers=settings.augmentation.num_workers,
        pin_memory=torch.cuda.is_available(),
    )
