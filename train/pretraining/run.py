"""A pretraining run, from slides to an encoder's folder.

RUN/encoder/        the teacher's encoder: timm opens it with local-dir:, `train fit` takes it as
                    --pathology-weights
RUN/last.ckpt       Lightning's state, to resume from
RUN/metrics.csv     losses and signs of collapse, one row per epoch
RUN/pretrain.json   settings, data and versions
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import lightning as L
import timm
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from train.data.order import EpochSampler
from train.errors import DestinationError
from train.files import whole_folder, write_errors_explained, write_json
from train.fitting.callbacks import EpochProgressBar, OwnSigterm
from train.fitting.loading import TileLoader
from train.fitting.metrics_file import METRICS_FILE, MetricsFile
from train.fitting.resume import RunInputs, resumed_epoch
from train.fitting.run_lock import only_run
from train.fitting.trainer import make_trainer
from train.pretraining.encoder import write_encoder
from train.pretraining.settings import PretrainSettings
from train.pretraining.sources import open_source
from train.pretraining.split_source import SplitSource, usable_slides
from train.pretraining.task import PretrainTask
from train.pretraining.views import ViewDataset

ENCODER_FOLDER = "encoder"
RECORD_FILE = "pretrain.json"
LAST_FILE = "last.ckpt"


def pretrain(
    settings: PretrainSettings,
    data: Path,
    run: Path,
    *,
    folds: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Pretrain an encoder on a source's training slides.

    Args:
        settings: The whole configuration.
        data: A data set's folder, or OCELOT as it is published.
        run: The folder to write.
        folds: A folds.csv that counts in place of the source's own.
        resume: Continue from `run/last.ckpt`.
        overwrite: Replace what an earlier run left in the folder.

    Returns:
        The encoder's folder.

    Raises:
        FocalPathError: the data, the settings or the folder cannot be used.
        CollapseError: the teacher collapsed.
    """
    encoder = run / ENCODER_FOLDER
    may_exist = resume or overwrite
    _refuse_earlier_run(run, may_exist=may_exist)
    found = open_source(data, folds)
    slides = usable_slides(found, found.slides["training"], settings.views)
    inputs = _inputs(settings, found, slides)
    first_epoch = resumed_epoch(run / LAST_FILE, inputs) if resume else 0
    schedule = settings.schedule
    L.seed_everything(schedule.seed, workers=True, verbose=False)
    task = PretrainTask(settings)
    with write_errors_explained(run):
        run.mkdir(parents=True, exist_ok=True)
        trainer = _trainer(settings, run, inputs)
        with only_run(run, is_first=trainer.is_global_zero):
            # Again: another process may have trained there meanwhile.
            _refuse_earlier_run(run, may_exist=may_exist or not trainer.is_global_zero)
            if resume:
                first_epoch = resumed_epoch(run / LAST_FILE, inputs)
            elif trainer.is_global_zero:  # another does not know whether the folder is free
                _remove_earlier_run(run)
            loader = view_loader(
                found,
                slides,
                settings,
                task.patch_size,
                rank=trainer.global_rank,
                num_ranks=trainer.world_size,
                first_epoch=first_epoch,
            )
            trainer.fit(task, loader, ckpt_path=run / LAST_FILE if resume else None)
            if trainer.is_global_zero:
                _write_record(run / RECORD_FILE, inputs)
                card = encoder_card(settings, found.name, len(slides))
                shutil.rmtree(encoder, ignore_errors=True)
                with whole_folder(encoder) as partial:
                    write_encoder(task.teacher_encoder(), partial, settings, card)
    return encoder


def _refuse_earlier_run(run: Path, *, may_exist: bool) -> None:
    is_there = [name for name in (ENCODER_FOLDER, LAST_FILE) if (run / name).exists()]
    if is_there and not may_exist:
        raise DestinationError(
            f"{run} has {' and '.join(is_there)} of an earlier run; expected a new folder. Add "
            f"--resume to continue from {LAST_FILE}, or --overwrite to start over."
        )


def _remove_earlier_run(run: Path) -> None:
    for name in (LAST_FILE, METRICS_FILE, RECORD_FILE):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / ENCODER_FOLDER, ignore_errors=True)


class _HealthyCheckpoint(ModelCheckpoint):
    """Writes last.ckpt after each epoch, but not while the teacher is collapsing."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write it."""
        if not cast(PretrainTask, pl_module).is_collapsing:
            super().on_train_epoch_end(trainer, pl_module)


def _trainer(settings: PretrainSettings, run: Path, inputs: dict[str, Any]) -> L.Trainer:
    schedule = settings.schedule
    callbacks: list[Callback] = [
        RunInputs(inputs),
        MetricsFile(run / METRICS_FILE),
        _HealthyCheckpoint(
            dirpath=run,
            filename=Path(LAST_FILE).stem,
            enable_version_counter=False,
            save_on_train_epoch_end=True,
        ),
        EpochProgressBar(),
        OwnSigterm(),
    ]
    return make_trainer(
        run,
        callbacks,
        devices=schedule.devices,
        max_epochs=schedule.steps // schedule.steps_per_epoch,
        precision=schedule.precision,
        gradient_clip_val=schedule.gradient_clip,
        logger=False,
        limit_val_batches=0,
    )


def view_loader(
    found: SplitSource,
    slides: tuple[int, ...],
    settings: PretrainSettings,
    patch_size: int,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    first_epoch: int = 0,
) -> DataLoader[Any]:
    """Read the samples of one process, an epoch after the other.

    Args:
        found: the source.
        slides: numbers of its slides to take samples from.
        settings: which views, and how many.
        patch_size: of the encoder, in pixels.
        rank: number of this process.
        num_ranks: processes that share an epoch.
        first_epoch: where a resumed run goes on.
    """
    schedule = settings.schedule
    dataset = ViewDataset(
        found.source,
        slides,
        settings.views,
        patch_size=patch_size,
        num_samples=schedule.steps_per_epoch * schedule.batch_size * num_ranks,
        seed=schedule.seed,
    )
    sampler = EpochSampler(
        len(dataset), schedule.seed, rank=rank, num_ranks=num_ranks, epoch=first_epoch
    )
    return TileLoader(
        dataset,
        batch_size=schedule.batch_size,
        sampler=sampler,
        drop_last=True,
        num_workers=schedule.num_workers,
        persistent_workers=schedule.num_workers > 0,  # they keep decoded images and open slides
    )


def _inputs(
    settings: PretrainSettings, found: SplitSource, slides: tuple[int, ...]
) -> dict[str, Any]:
    """Everything that the result depends on, after a round trip through JSON."""
    names = [found.source.slides[slide].name for slide in slides]
    return {**_settings_of(settings), "slides": names}


def _settings_of(settings: PretrainSettings) -> dict[str, dict[str, Any]]:
    """The settings that the result depends on, by group, after a round trip through JSON."""
    content = asdict(settings)
    content.pop("preset")
    content["schedule"].pop("num_workers")
    return cast("dict[str, dict[str, Any]]", json.loads(json.dumps(content)))


def trained_otherwise(run: Path, settings: PretrainSettings, found: SplitSource) -> list[str]:
    """What differs from what a finished run was trained with, as `steps 4 -> 8`.

    Empty where nothing differs, and where the run has no record of it.
    """
    try:
        before = json.loads((run / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    changes = [
        f"{name} {before[group].get(name)} -> {value}"
        for group, values in _settings_of(settings).items()
        if isinstance(before, dict) and isinstance(before.get(group), dict)
        for name, value in values.items()
        if before[group].get(name) != value
    ]
    training = {found.source.slides[slide].name for slide in found.slides["training"]}
    seen = before.get("slides") if isinstance(before, dict) else None
    if isinstance(seen, list) and (others := sorted(set(map(str, seen)) - training)):
        changes.append(f"{len(others)} slides that are not for training here, such as {others[0]}")
    return changes


def _write_record(path: Path, inputs: dict[str, Any]) -> None:
    versions = {"torch": torch.__version__, "timm": timm.__version__, "lightning": L.__version__}
    write_json(path, {**inputs, "versions": versions})


def encoder_card(settings: PretrainSettings, data: str, num_slides: int) -> str:
    """The encoder's README.md: what it is, and what it is not."""
    views, schedule = settings.views, settings.schedule
    scales = ", ".join(f"{mpp:g}" for mpp in sorted(views.mpps))
    method = {
        "mad": "Magnification-Aware Distillation",
        "dino": f"DINO with {views.dino_scales} scales",
    }[views.method]
    return f"""# Pathology encoder: {method}

A vision transformer ({settings.encoder.encoder}) pretrained by FocalPath without labels on
{num_slides} slides of `{data}`, at {scales} um per pixel, for {schedule.steps} steps of
{schedule.batch_size} samples, seed {schedule.seed}.

It follows the published idea of Magnification-Aware Distillation (arXiv 2512.14796), of which only
the abstract was known. It is not MAD-NP, and no result of that paper is claimed for it.
For research only.

    timm.create_model("local-dir:ENCODER", pretrained=True)

Inputs are RGB in [0, 1], normalised with the mean and standard deviation in config.json.
"""
