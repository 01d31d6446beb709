"""A training run, from a folder of tiles to a checkpoint, and the evaluation of one.

RUN/model.safetensors, model.json   the checkpoint of the best validation Dice
RUN/last.ckpt                       Lightning's state, to resume from
RUN/metrics.csv                     losses, scores and biases of every epoch
RUN/training.png                    the same as a figure
"""

import csv
import logging
import os
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    RichProgressBar,
)
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from train.checkpoint import (
    CARD_FILE,
    WEIGHTS_FILE,
    CheckpointCard,
    TrainingData,
    read_card,
    save_checkpoint,
)
from train.dataset import (
    NUM_VIEWS,
    EpochSampler,
    Split,
    TileDataset,
    TileFolder,
    class_frequencies,
    count_pixels,
    evaluation_tiles,
    read_tile_folder,
)
from train.embedding_cache import CachedTileDataset, EmbeddingCache
from train.errors import FocalPathError
from train.figures import plot_training
from train.focal_attention import initial_bias
from train.segmenter import Segmenter
from train.settings import RuntimeSettings, Settings, TissueClass
from train.task import SegmentationTask
from train.weights import WHERE_TO_GET_WEIGHTS, load_pathology_weights, load_sam_weights

METRICS_FILE = "metrics.csv"
FIGURE_FILE = "training.png"
LAST_FILE = "last.ckpt"

# Lightning's own use of torch, and its advice on workers, which the settings decide.
_WARNINGS_OF_OTHERS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    "The .* does not have many workers",
    r"Found \d+ module\(s\) in eval mode at the start of training",
    "Checkpoint directory .* exists and is not empty",
)
_CLASSES_IN_BAR = 6


def fit(
    settings: Settings,
    data: Path,
    run: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    difficulty_from: Path | None = None,
) -> CheckpointCard:
    """Train on a data set and write the run's folder.

    Args:
        settings: The whole configuration.
        data: A data set in SAM-Path's layout.
        run: The folder to write.
        resume: Continue from `run/last.ckpt`.
        overwrite: Replace what an earlier run left in the folder.
        difficulty_from: A trained baseline, whose Dice a class hcfa takes for difficulty.

    Returns:
        The card of the best checkpoint.

    Raises:
        FocalPathError: the data, the settings, the weights or the loss cannot be used, or the
            folder has a trained model.
    """
    last = run / LAST_FILE
    resume = resume and last.is_file()
    if (run / WEIGHTS_FILE).exists() and not (resume or overwrite):
        raise FocalPathError(
            f"{run} has a trained model; expected a new folder. Add --resume to continue it from "
            f"{LAST_FILE}, where that is there, or --overwrite to replace it."
        )
    folder = read_tile_folder(data)
    frequencies = class_frequencies(folder)
    count_pixels(folder, "validation")
    dice = None if difficulty_from is None else _baseline_dice(difficulty_from, folder)
    bias = initial_bias(settings.bias, frequencies, dice)
    L.seed_everything(settings.optimization.seed, workers=True, verbose=False)
    segmenter = Segmenter(settings, bias)
    _load_encoders(segmenter, settings)
    loaders = _loaders(folder, settings, segmenter)
    card = partial(
        CheckpointCard,
        settings=settings,
        classes=folder.classes,
        mpp=folder.mpp,
        data=TrainingData(
            name=folder.root.resolve().name,
            num_training_tiles=len(folder.tiles["training"]),
            num_validation_tiles=len(folder.tiles["validation"]),
        ),
        pixel_frequencies=tuple(frequencies.tolist()),
    )
    if not resume:
        for name in (WEIGHTS_FILE, CARD_FILE, METRICS_FILE, FIGURE_FILE, LAST_FILE):
            (run / name).unlink(missing_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    trainer = _trainer(settings, run, _callbacks(settings, run, card, folder.classes))
    task = SegmentationTask(segmenter, settings, folder.classes)
    if settings.runtime.compile:
        task.compile_parts()
    trainer.fit(task, *loaders, ckpt_path=last if resume else None)
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        plot_training(run / METRICS_FILE, folder.classes, run / FIGURE_FILE)
    return read_card(run)


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
    settings = replace(card.settings, runtime=RuntimeSettings())
    trainer = _trainer(settings, None, [RichProgressBar(leave=False)])
    loader = _evaluation_loader(evaluation_tiles(folder, split, settings), settings)
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
        self._run = run
        self._make_card = card
        self._best_dice = -1.0

    def on_validation_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        assert isinstance(task, SegmentationTask)
        scores = {
            name.removeprefix("validation/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("validation/")
        }
        if not scores["dice/mean"] > self._best_dice:  # nor if it is not a number
            return
        self._best_dice = scores["dice/mean"]
        if trainer.is_global_zero:
            bias = task.segmenter.class_attention_bias.delta.detach().tolist()
            card = self._make_card(class_attention_bias=tuple(bias), metrics=scores)
            save_checkpoint(self._run, task.segmenter, card)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {"best_dice": self._best_dice}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best Dice of the run that is resumed."""
        self._best_dice = state_dict["best_dice"]


class _MetricsFile(Callback):
    """Writes a row an epoch into the CSV, whole; a resumed run keeps the rows before it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[dict[str, str]] = []

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        if self._path.is_file():
            with self._path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            self._rows = [row for row in rows if int(row["epoch"]) < trainer.current_epoch]

    def on_train_epoch_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        values = {name: str(float(value)) for name, value in trainer.callback_metrics.items()}
        self._rows.append({"epoch": str(trainer.current_epoch), **dict(sorted(values.items()))})
        if not trainer.is_global_zero:
            return
        partial_path = self._path.with_name(f".{self._path.name}.partial")
        with partial_path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(self._rows[-1]), restval="")
            writer.writeheader()
            writer.writerows(self._rows)
        os.replace(partial_path, self._path)


class _ProgressBar(RichProgressBar):
    """Lightning's bar with the last validation Dice of each class, by its first letters."""

    def __init__(self, classes: tuple[TissueClass, ...]) -> None:
        super().__init__(leave=False)
        self._classes = classes

    def get_metrics(self, trainer: L.Trainer, task: L.LightningModule) -> dict[str, Any]:
        """The loss, the mean Dice and each class's."""
        found = trainer.callback_metrics
        shown: dict[str, Any] = {}
        if "loss" in found:
            shown["loss"] = f"{found['loss']:.3f}"
        if "validation/dice/mean" in found:
            each = [
                f"{entry.name[:3]} {found[f'validation/dice/{entry.name}']:.2f}"
                for entry in self._classes[:_CLASSES_IN_BAR]
            ]
            shown["Dice"] = f"{found['validation/dice/mean']:.3f} ({' '.join(each)})"
        return shown


def _callbacks(
    settings: Settings, run: Path, card: "partial[CheckpointCard]", classes: tuple[TissueClass, ...]
) -> list[Callback]:
    callbacks: list[Callback] = [
        _BestCheckpoint(run, card),
        _MetricsFile(run / METRICS_FILE),
        ModelCheckpoint(dirpath=run, filename=Path(LAST_FILE).stem, enable_version_counter=False),
        _ProgressBar(classes),
    ]
    if settings.runtime.patience is not None:
        callbacks.append(
            EarlyStopping("validation/dice/mean", mode="max", patience=settings.runtime.patience)
        )
    return callbacks


def _baseline_dice(run: Path, folder: TileFolder) -> torch.Tensor:
    """Dice of each class (C,) that a trained baseline reached on its validation tiles."""
    card = read_card(run)
    names = [entry.name for entry in folder.classes]
    found = [entry.name for entry in card.classes]
    if found != names:
        raise FocalPathError(
            f"the baseline {run} has the classes {', '.join(found)}; expected those of the data "
            f"set, {', '.join(names)}. Train the baseline on the same data set."
        )
    # A class that is neither there nor predicted has no Dice: nothing says that it is hard.
    return torch.tensor([card.metrics[f"dice/{name}"] for name in names]).nan_to_num(1.0)


def _load_encoders(segmenter: Segmenter, settings: Settings) -> None:
    weights = settings.weights
    missing = [
        f"--{name}"
        for name in ("sam_weights", "pathology_weights")
        if getattr(weights, name) is None
    ]
    if settings.model.encoders_frozen and missing and not weights.random_encoders:
        raise FocalPathError(
            f"the encoders are frozen, and {' and '.join(missing).replace('_', '-')} is not given: "
            "random encoders see nothing. Expected the published weights' files, or "
            f"--no-encoders-frozen. Where they come from:\n{WHERE_TO_GET_WEIGHTS}"
        )
    if weights.sam_weights is not None:
        load_sam_weights(segmenter, Path(weights.sam_weights))
    if weights.pathology_weights is not None:
        load_pathology_weights(segmenter, Path(weights.pathology_weights))


def _trainer(settings: Settings, run: Path | None, callbacks: list[Callback]) -> L.Trainer:
    optimization, runtime = settings.optimization, settings.runtime
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in _WARNINGS_OF_OTHERS:
        warnings.filterwarnings("ignore", message=message)
    processes = runtime.devices * runtime.nodes
    return L.Trainer(
        accelerator="auto",
        devices=runtime.devices,
        num_nodes=runtime.nodes,
        strategy="ddp" if processes > 1 else "auto",
        max_epochs=optimization.epochs,
        precision=optimization.precision,
        accumulate_grad_batches=optimization.accumulate_batches,
        gradient_clip_val=optimization.gradient_clip,
        logger=_loggers(settings, run) if run else False,
        callbacks=callbacks,
        enable_checkpointing=run is not None,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        default_root_dir=run,
    )


def _loggers(settings: Settings, run: Path) -> list[Logger]:
    loggers: list[Logger] = []
    try:
        if settings.runtime.track == "tensorboard":
            loggers.append(TensorBoardLogger(run, name="", version="tensorboard"))
        elif settings.runtime.track == "mlflow":
            # MLflow's own default; Lightning's, a folder of files, is no longer taken.
            place = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
            name = settings.preset
            loggers.append(MLFlowLogger(name, run_name=run.name, tracking_uri=place))
    except ModuleNotFoundError as error:
        raise FocalPathError(
            f"--track {settings.runtime.track} needs a package that is not installed "
            f"({error.name}). Run `pip install {settings.runtime.track}`, or track csv alone."
        ) from error
    return loggers


def _loaders(
    folder: TileFolder, settings: Settings, segmenter: Segmenter
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """The loaders of training and validation tiles, of images or of their cached features."""
    training = TileDataset(
        folder.tiles["training"],
        len(folder.classes),
        settings.model.tile_size_px,
        settings.augmentation,
        seed=settings.optimization.seed,
    )
    validation = evaluation_tiles(folder, "validation", settings)
    if settings.runtime.embedding_cache is None:
        return _training_loader(training, settings), _evaluation_loader(validation, settings)
    cache = EmbeddingCache(settings, segmenter)
    num_views = NUM_VIEWS if settings.augmentation.augment == "dihedral" else 1
    batch_size = settings.optimization.batch_size
    cache.fill(training, range(num_views), batch_size)
    cache.fill(validation, range(1), batch_size)
    return (
        _training_loader(CachedTileDataset(training, cache), settings),
        _evaluation_loader(CachedTileDataset(validation, cache), settings),
    )


def _training_loader(
    dataset: TileDataset | CachedTileDataset, settings: Settings
) -> DataLoader[Any]:
    optimization, runtime = settings.optimization, settings.runtime
    rank, num_ranks = _rank(), runtime.devices * runtime.nodes
    sampler = EpochSampler(len(dataset), optimization.seed, rank=rank, num_ranks=num_ranks)
    return DataLoader(
        cast("Dataset[Any]", dataset),
        batch_size=optimization.batch_size,
        sampler=sampler,
        drop_last=len(sampler) >= optimization.batch_size,
        num_workers=settings.augmentation.num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def _evaluation_loader(
    dataset: TileDataset | CachedTileDataset, settings: Settings
) -> DataLoader[Any]:
    """Each rank counts its share of the tiles; the counts are added up at the end."""
    num_ranks = settings.runtime.devices * settings.runtime.nodes
    return DataLoader(
        cast("Dataset[Any]", dataset),
        batch_size=settings.optimization.batch_size,
        sampler=range(_rank(), len(dataset), num_ranks),
        num_workers=settings.augmentation.num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def _rank() -> int:
    """This process's number among all that train together; Lightning and torchrun set it."""
    node, local = (int(os.environ.get(name, "0")) for name in ("NODE_RANK", "LOCAL_RANK"))
    return int(os.environ.get("RANK", node * int(os.environ.get("WORLD_SIZE", "1")) + local))
