"""A training run, from a folder of tiles to a checkpoint.

RUN/model.safetensors, model.json   the checkpoint of the best validation Dice
RUN/run.yaml                        its settings, to start another run from
RUN/last.ckpt                       Lightning's state, to resume from
RUN/metrics.csv                     losses, scores and biases of every epoch
RUN/training.png                    the same as a figure
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from train.config import SETTINGS_FILE, write_settings
from train.console import warn
from train.data.check import stated_mpp_warnings
from train.data.folder import Split, TileFolder, read_tile_folder
from train.data.leaks import leak_warnings
from train.data.pixels import class_frequencies, require_trainable
from train.data.scale import resolve_mpp
from train.errors import DestinationError, RunError, SettingsError
from train.files import sha256_of, write_errors_explained
from train.fitting.callbacks import BestCheckpoint, ClassProgressBar, OwnSigterm
from train.fitting.curves import plot_training
from train.fitting.loaders import make_loaders
from train.fitting.metrics_file import METRICS_FILE, MetricsFile
from train.fitting.resume import ResumableEarlyStopping, RunInputs, resumed_epoch, run_inputs
from train.fitting.run_lock import only_run
from train.fitting.scores import baseline_dice
from train.fitting.task import SegmentationTask
from train.fitting.trainer import trainer_of
from train.model.build import build_segmenter
from train.model.checkpoint import (
    CARD_FILE,
    MAX_WEIGHTS_BYTES,
    WEIGHTS_FILE,
    CheckpointCard,
    TrainingData,
    WeightsOrigin,
    read_card,
    weights_file,
)
from train.model.class_bias import ClassStatistics, find_strategy
from train.model.previous_run import EarlierRun, settings_after
from train.model.segmenter import Segmenter
from train.model.starting_weights import StartingWeights, starting_weights
from train.settings import LabelClass, Settings

FIGURE_FILE = "training.png"
LAST_FILE = "last.ckpt"


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
        data: A data set in SAM-Path's layout, or one that is read already.
        run: The folder to write.
        resume: Continue from `run/last.ckpt`.
        overwrite: Replace what an earlier run left in the folder.
        difficulty_from: Run of a trained baseline. `hcfa` takes its per-class Dice as difficulty.

    Returns:
        The card of the best checkpoint.

    Raises:
        FocalPathError: the data, the settings, the weights or the loss cannot be used, the folder
            has a trained model or cannot be written, or there is no such run to resume.
    """
    may_exist = resume or overwrite
    _refuse_trained(run, may_exist=may_exist)
    folder = data if isinstance(data, TileFolder) else read_tile_folder(data)
    start = _find_start(settings)
    settings = at_scale(start.settings, folder, ("training", "validation"))
    _check_shares(folder, settings)
    counts = require_trainable(folder)
    frequencies = class_frequencies(folder, counts)
    dice = baseline_dice(settings, difficulty_from, folder)
    inputs = run_inputs(settings, folder, dice)
    first_epoch = resumed_epoch(run / LAST_FILE, inputs) if resume else 0
    if resume and not (run / WEIGHTS_FILE).is_file():
        raise RunError(
            f"{run} has {LAST_FILE} without {WEIGHTS_FILE}, the best epoch's weights, which a "
            "later epoch may not reach. Restore that file, or start over with --overwrite."
        )
    L.seed_everything(settings.optimization.seed, workers=True, verbose=False)
    segmenter = _segmenter(settings, folder, ClassStatistics(frequencies, dice))
    origins = start.load_into(segmenter, folder.classes)
    card = _card(settings, folder, frequencies, origins)
    with write_errors_explained(run):
        run.mkdir(parents=True, exist_ok=True)
        callbacks = [RunInputs(inputs), *_callbacks(settings, run, card, folder.classes)]
        trainer = trainer_of(settings, run, callbacks)
        with only_run(run, is_first=trainer.is_global_zero):
            _refuse_trained(run, may_exist=may_exist or not trainer.is_global_zero)
            if resume:  # again: another process may have gone on with it meanwhile
                first_epoch = resumed_epoch(run / LAST_FILE, inputs)
            loaders = make_loaders(folder, settings, segmenter, trainer, first_epoch, counts)
            if trainer.is_global_zero:  # another does not know whether the folder is free
                _remove_old(run, keep_results=resume)
            task = SegmentationTask(segmenter, settings, folder.classes, frequencies)
            if trainer.is_global_zero:
                # What makes a model or its scores wrong without a failure.
                for warning in (*leak_warnings(folder), *stated_mpp_warnings(folder)):
                    warn(warning)
                write_settings(run / SETTINGS_FILE, settings)
            if settings.runtime.compile:
                task.compile_parts()
            trainer.fit(task, *loaders, ckpt_path=run / LAST_FILE if resume else None)
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                plot_training(run / METRICS_FILE, folder.classes, run / FIGURE_FILE)
    return read_card(run)


def _refuse_trained(run: Path, *, may_exist: bool) -> None:
    if (run / WEIGHTS_FILE).exists() and not may_exist:
        raise DestinationError(
            f"{run} has a trained model; expected a new folder. Add --resume to continue it from "
            f"{LAST_FILE}, where that is there, or --overwrite to replace it."
        )


def _find_start(settings: Settings) -> StartingWeights | EarlierRun:
    """Find what a run starts from, before it trains.

    Raises:
        SettingsError: both an earlier run and published weights are given.
        WeightsError: published weights are missing, or cannot be read.
        CheckpointError: the earlier run has no checkpoint, or another architecture than asked for.
    """
    weights = settings.weights
    if weights.from_run is None:
        return starting_weights(settings)
    if weights.sam_weights is not None or weights.pathology_weights is not None:
        raise SettingsError(
            f"--from {weights.from_run} is given together with published weights, which its own "
            "would replace. Leave out --sam-weights and --pathology-weights."
        )
    run = Path(weights.from_run)
    return EarlierRun(settings_after(settings, run), run, sha256_of(weights_file(run)))


def _check_exportable(segmenter: Segmenter, settings: Settings) -> None:
    """Refuse a U-Net, and a model that is too large for one ONNX file, before it trains.

    Raises:
        SettingsError: it is one of these.
    """
    if settings.model.network != "sam_path":
        raise SettingsError(
            f"--network {settings.model.network} is only there to compare with, and is not "
            "exported. Add --no-exportable to train it for `evaluate` and `predict`."
        )
    num_bytes = sum(value.numel() * 4 for value in segmenter.state_dict().values())
    if num_bytes > MAX_WEIGHTS_BYTES:
        raise SettingsError(
            f"the model has {num_bytes / 4e6:.0f} million parameters with the encoders "
            f"{settings.model.image_encoder} and {settings.model.pathology_encoder}; at most "
            f"{MAX_WEIGHTS_BYTES / 4e6:.0f} million can be exported, since an ONNX file holds "
            "2 GiB. Choose smaller encoders, or add --no-exportable to train it for `evaluate` "
            "and `predict` alone."
        )


def _segmenter(settings: Settings, folder: TileFolder, statistics: ClassStatistics) -> Segmenter:
    """The model with random weights and the class bias at its start.

    Raises:
        SettingsError: the model cannot be exported, and `exportable` is set.
    """
    strategy = find_strategy(settings.model.bias)
    segmenter = build_segmenter(settings.model, len(folder.classes))
    if settings.runtime.exportable:
        _check_exportable(segmenter, settings)
    segmenter.class_attention_bias.start(
        strategy.initial(settings.bias, statistics),
        learned=strategy.learned and not settings.bias.bias_frozen,
    )
    return segmenter


def _card(
    settings: Settings,
    folder: TileFolder,
    frequencies: Tensor,
    origins: tuple[WeightsOrigin, ...],
) -> "partial[CheckpointCard]":
    """The part of a checkpoint's card that is known before training."""
    return partial(
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


def _remove_old(run: Path, *, keep_results: bool) -> None:
    """Remove what an interrupted write left and, unless kept, an earlier run's results."""
    names = (WEIGHTS_FILE, CARD_FILE, METRICS_FILE, FIGURE_FILE, LAST_FILE)
    results = [] if keep_results else [run / name for name in names]
    for path in (*results, *run.glob(".*.partial-*")):
        path.unlink(missing_ok=True)


def at_scale(settings: Settings, folder: TileFolder, splits: Sequence[Split]) -> Settings:
    """Settle the um per pixel that the model sees: the settings', else the data set's.

    Raises:
        ScaleError: the um per pixel of some images are not known.
    """
    tiles = [tile for split in splits for tile in folder.tiles[split]]
    mpp = resolve_mpp(settings.model.mpp, folder.mpp, tiles)
    return replace(settings, model=replace(settings.model, mpp=mpp))


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
