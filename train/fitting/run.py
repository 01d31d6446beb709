"""A training run, from a folder of tiles to a checkpoint, and the evaluation of one.

RUN/model.safetensors, model.json   the checkpoint of the best validation Dice
RUN/run.yaml                        its settings, to start another run from
RUN/last.ckpt                       Lightning's state, to resume from
RUN/metrics.csv                     losses, scores and biases of every epoch
RUN/training.png                    the same as a figure
"""

import logging
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from train.config import SETTINGS_FILE, write_settings
from train.data.augmentation import NUM_VIEWS
from train.data.dataset import EpochSampler, TileDataset, WholeImageDataset
from train.data.folder import Split, TileFolder, read_tile_folder
from train.data.pixels import class_frequencies, count_each, count_pixels, require_trainable
from train.data.scale import TileScale, resolve_mpp
from train.errors import (
    BaselineError,
    CheckpointError,
    DatasetError,
    DestinationError,
    MissingPackageError,
    SettingsError,
)
from train.files import write_errors_explained
from train.fitting.callbacks import BestCheckpoint, ClassProgressBar, MetricsFile, OwnSigterm
from train.fitting.curves import plot_training
from train.fitting.embedding_cache import CachedTileDataset, CachedWholeImages, EmbeddingCache
from train.fitting.evaluation import predict_split, whole_image_loader
from train.fitting.loading import ErrorsAsItems, TileLoader
from train.fitting.resume import (
    ResumableEarlyStopping,
    RunInputs,
    WholeStateIO,
    resumed_epoch,
    run_inputs,
)
from train.fitting.sampling import BalancedSampler, balanced_weights
from train.fitting.start import find_start
from train.fitting.task import SegmentationTask, named_scores
from train.metrics import PooledConfusion, class_scores
from train.model.build import build_segmenter
from train.model.checkpoint import CARD_FILE, WEIGHTS_FILE, CheckpointCard, TrainingData, read_card
from train.model.class_bias import STRATEGIES, ClassStatistics, find_strategy
from train.model.segmenter import Segmenter
from train.settings import LabelClass, Settings

METRICS_FILE = "metrics.csv"
FIGURE_FILE = "training.png"
LAST_FILE = "last.ckpt"

# Lightning's own use of torch, and its advice on workers, which the settings decide.
_WARNINGS_OF_OTHERS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    "The .* does not have many workers",
    r"Found \d+ module\(s\) in eval mode at the start of training",
    "Checkpoint directory .* exists and is not empty",
    "The dirpath has changed",
)


def fit(
    settings: Settings,
    data: Path | TileFolder,
    run: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    difficulty_from: Path | None = None,
) -> CheckpointCard:
    """Train on a data set and write the run's folder.

    Args:
        settings: The whole configuration.
        data: A data set in SAM-Path's layout, or one that was read and sorted otherwise.
        run: The folder to write.
        resume: Continue from `run/last.ckpt`.
        overwrite: Replace what an earlier run left in the folder.
        difficulty_from: A trained baseline, whose Dice a class hcfa takes for difficulty.

    Returns:
        The card of the best checkpoint.

    Raises:
        FocalPathError: the data, the settings, the weights or the loss cannot be used, the folder
            has a trained model or cannot be written, or there is no such run to resume.
    """
    if (run / WEIGHTS_FILE).exists() and not (resume or overwrite):
        raise DestinationError(
            f"{run} has a trained model; expected a new folder. Add --resume to continue it from "
            f"{LAST_FILE}, where that is there, or --overwrite to replace it."
        )
    strategy = find_strategy(settings.model.bias)
    folder = data if isinstance(data, TileFolder) else read_tile_folder(data)
    start = find_start(settings)
    settings = at_scale(start.settings, folder, ("training", "validation"))
    _check_shares(folder, settings)
    require_trainable(folder)
    counts = count_each(folder, "training")
    frequencies = class_frequencies(folder, counts)
    dice = _difficulty(settings, difficulty_from, folder)
    inputs = run_inputs(settings, folder, dice)
    last = run / LAST_FILE
    first_epoch = resumed_epoch(last, inputs) if resume else 0
    L.seed_everything(settings.optimization.seed, workers=True, verbose=False)
    segmenter = build_segmenter(settings.model, len(folder.classes))
    segmenter.class_attention_bias.start(
        strategy.initial(settings.bias, ClassStatistics(frequencies, dice)),
        learned=strategy.learned and not settings.bias.bias_frozen,
    )
    origins = start.load(segmenter, folder.classes)
    card = partial(
        CheckpointCard,
        settings=settings,
        classes=folder.classes,
        mpp=settings.model.mpp,
        data=TrainingData(
            name=folder.root.resolve().name,
            num_training_tiles=len(folder.tiles["training"]),
            num_validation_tiles=len(folder.tiles["validation"]),
        ),
        pixel_frequencies=tuple(frequencies.tolist()),
        origins=origins,
    )
    with write_errors_explained(run):
        run.mkdir(parents=True, exist_ok=True)
        callbacks = [RunInputs(inputs), *_callbacks(settings, run, card, folder.classes)]
        trainer = _trainer(settings, run, callbacks)
        loaders = _loaders(folder, settings, segmenter, trainer, first_epoch, counts)
        names = (WEIGHTS_FILE, CARD_FILE, METRICS_FILE, FIGURE_FILE, LAST_FILE)
        old = [] if resume else [run / name for name in names]
        for path in (*old, *run.glob(".*.partial-*")):
            path.unlink(missing_ok=True)
        task = SegmentationTask(segmenter, settings, folder.classes, frequencies)
        if trainer.is_global_zero:
            write_settings(run / SETTINGS_FILE, settings)
        if settings.runtime.compile:
            task.compile_parts()
        trainer.fit(task, *loaders, ckpt_path=last if resume else None)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            plot_training(run / METRICS_FILE, folder.classes, run / FIGURE_FILE)
    return read_card(run)


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
        FocalPathError: the data set has other classes, or the split no labelled pixel.
    """
    folder = read_tile_folder(data)
    _check_classes(card, "the checkpoint", folder)
    _check_scale(card, folder, split)
    _check_labelled(folder, split)
    confusion = PooledConfusion(len(card.classes))
    images = predict_split(segmenter, card, folder, split, tta=tta)
    for image in track(images, f"Scoring {split} images", total=len(folder.tiles[split])):
        confusion.update(image.predicted[None], image.labels[None])
    return named_scores(class_scores(confusion.compute()), card.classes)


def at_scale(settings: Settings, folder: TileFolder, splits: Sequence[Split]) -> Settings:
    """Settle the um per pixel that the model sees: the settings', else the data set's.

    Raises:
        FocalPathError: the scale of some images is not known.
    """
    tiles = [tile for split in splits for tile in folder.tiles[split]]
    mpp = resolve_mpp(settings.model.mpp, folder.mpp, tiles)
    return replace(settings, model=replace(settings.model, mpp=mpp))


def _check_scale(card: CheckpointCard, folder: TileFolder, split: Split) -> None:
    """Refuse images of unknown scale, and say what a checkpoint of version 0.1 does."""
    if not card.settings.model.squeeze:
        if card.mpp is not None:
            resolve_mpp(card.mpp, folder.mpp, folder.tiles[split])
        return
    side = card.settings.model.tile_size_px
    Console().print(
        f"[yellow]warning:[/yellow] this checkpoint is of version 0.1, which squeezed every image "
        f"to {side} x {side} pixels, and so are the images now. Its um per pixel "
        f"({card.mpp or 'unknown'}) is right only for images like those that it was trained on.",
        soft_wrap=True,
    )


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


def _check_shares(folder: TileFolder, settings: Settings) -> None:
    """Refuse more processes than tiles: one would wait for the others forever."""
    num_processes = settings.runtime.devices * settings.runtime.nodes
    splits: tuple[Split, ...] = ("training", "validation")
    for split in splits:
        num_tiles = len(folder.tiles[split])
        if 0 < num_tiles < num_processes:
            raise SettingsError(
                f"{folder.root} has {num_tiles} {split} tiles for {num_processes} processes "
                "(--devices times --nodes); expected a tile for each. Use fewer."
            )


def _check_labelled(folder: TileFolder, split: Split) -> None:
    """Refuse tiles on which there is nothing to score."""
    if not count_pixels(folder, split)[1:].any():
        raise DatasetError(
            f"no pixel of the {split} tiles of {folder.root} is labelled; scores need some. Move "
            "tiles between folds in folds.csv, or correct the masks."
        )


def _check_classes(card: CheckpointCard, of_what: str, folder: TileFolder) -> None:
    """Refuse a data set whose labels mean something else."""
    names = [entry.name for entry in folder.classes]
    found = [entry.name for entry in card.classes]
    if found != names:
        raise CheckpointError(
            f"{of_what} has the classes {', '.join(found)}; expected those of {folder.root}, "
            f"{', '.join(names)}, in their order. Take one that was trained on the same classes."
        )


def _difficulty(settings: Settings, baseline: Path | None, folder: TileFolder) -> Tensor | None:
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
    _check_classes(card, f"the baseline {baseline}", folder)
    names = [f"dice/{entry.name}" for entry in folder.classes]
    if not card.metrics.keys() >= set(names):
        raise BaselineError(
            f"the baseline {baseline} has no validation Dice (was it imported with --no-score?), "
            f"and hcfa takes that for difficulty. Train one in another folder: {train_it}"
        )
    # NaN for a class that is absent: nothing says how hard it is.
    return torch.tensor([card.metrics[name] for name in names])


def _callbacks(
    settings: Settings, run: Path, card: "partial[CheckpointCard]", classes: tuple[LabelClass, ...]
) -> list[Callback]:
    callbacks: list[Callback] = [
        BestCheckpoint(run, card, settings.optimization.keep_epoch),
        MetricsFile(run / METRICS_FILE),
        ModelCheckpoint(dirpath=run, filename=Path(LAST_FILE).stem, enable_version_counter=False),
        ClassProgressBar(classes),
        OwnSigterm(),
    ]
    if (patience := settings.runtime.patience) is not None:
        callbacks.append(
            ResumableEarlyStopping("validation/dice/mean", mode="max", patience=patience)
        )
    return callbacks


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
        plugins=[WholeStateIO()],
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
        raise MissingPackageError(
            f"--track {settings.runtime.track} needs a package that is not installed "
            f"({error.name}). Run `pip install {settings.runtime.track}`, or track csv alone."
        ) from error
    return loggers


def _loaders(
    folder: TileFolder,
    settings: Settings,
    segmenter: Segmenter,
    trainer: L.Trainer,
    first_epoch: int,
    counts: NDArray[np.int64],
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """The loaders of training tiles and of whole validation images, or of their features."""
    model, cached = settings.model, settings.runtime.embedding_cache is not None
    scale = TileScale(tile_size_px=model.tile_size_px, mpp=model.mpp)
    num_classes = len(folder.classes)
    training = TileDataset(
        folder.tiles["training"],
        num_classes,
        scale,
        settings.augmentation,
        seed=settings.optimization.seed,
        fixed=cached,
    )
    weights = None
    if settings.optimization.sampling == "balanced":
        weights = balanced_weights(counts, [image for image, _ in training.items])
    validation = WholeImageDataset(folder.tiles["validation"], num_classes, scale)
    if not cached:
        return (
            _training_loader(training, settings, trainer, first_epoch, weights),
            _validation_loader(validation, settings, trainer),
        )
    # Lightning would move the model only later.
    cache = EmbeddingCache(settings, segmenter.to(trainer.strategy.root_device))
    num_views = NUM_VIEWS if settings.augmentation.augment == "dihedral" else 1
    batch_size = settings.optimization.batch_size
    cache.fill(training, range(num_views), batch_size)
    cache.fill(validation, range(1), batch_size)
    return (
        _training_loader(
            CachedTileDataset(training, cache), settings, trainer, first_epoch, weights
        ),
        _validation_loader(CachedWholeImages(validation, cache), settings, trainer),
    )


def _training_loader(
    dataset: TileDataset | CachedTileDataset,
    settings: Settings,
    trainer: L.Trainer,
    first_epoch: int,
    weights: NDArray[np.float64] | None,
) -> DataLoader[Any]:
    optimization = settings.optimization
    # Workers ask it for tiles before Lightning tells it the epoch that a resumed run is in.
    where = {
        "rank": trainer.global_rank,
        "num_ranks": trainer.world_size,
        "epoch": first_epoch,
    }
    sampler = (
        EpochSampler(len(dataset), optimization.seed, **where)
        if weights is None
        else BalancedSampler(weights, optimization.seed, **where)
    )
    num_workers = settings.augmentation.num_workers
    return TileLoader(
        ErrorsAsItems(dataset),
        batch_size=optimization.batch_size,
        sampler=sampler,
        drop_last=len(sampler) >= optimization.batch_size,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,  # they keep decoded images
        pin_memory=torch.cuda.is_available(),
    )


def _validation_loader(
    dataset: WholeImageDataset | CachedWholeImages, settings: Settings, trainer: L.Trainer
) -> DataLoader[Any]:
    """Each rank counts its share of the images; the counts are added up at the end."""
    return whole_image_loader(
        dataset,
        settings.optimization.batch_size,
        settings.augmentation.num_workers,
        rank=trainer.global_rank,
        num_ranks=trainer.world_size,
    )
