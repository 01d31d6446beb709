"""Lightning's Trainer, as training and pretraining use it."""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger

from train.errors import MissingPackageError, SettingsError
from train.fitting.resume import WholeStateIO
from train.settings import Settings

# Lightning's own use of torch, and its advice on workers, which the settings decide.
_WARNINGS_OF_OTHERS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    "The .* does not have many workers",
    r"Found \d+ module\(s\) in eval mode at the start of training",
    "Checkpoint directory .* exists and is not empty",
    "The dirpath has changed",
)


def make_trainer(
    run: Path,
    callbacks: list[Callback],
    *,
    devices: int,
    nodes: int = 1,
    **options: Any,
) -> L.Trainer:
    """Build a quiet Trainer that writes its state atomically.

    Args:
        run: the run's folder.
        callbacks: of the run.
        devices: GPUs, or processes on the CPU, of each node.
        nodes: machines.
        **options: others of `lightning.Trainer`, by its own names.

    Raises:
        SettingsError: Slurm has started another number of processes.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in _WARNINGS_OF_OTHERS:
        warnings.filterwarnings("ignore", message=message)
    return L.Trainer(
        accelerator="auto",
        devices=devices,
        num_nodes=nodes,
        strategy="ddp" if devices * nodes > 1 else "auto",
        callbacks=callbacks,
        plugins=[WholeStateIO(), *_own_processes(devices * nodes)],
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        default_root_dir=run,
        **options,
    )


def _own_processes(num_processes: int) -> list[LightningEnvironment]:
    """The plugin that starts the processes, in a job of Slurm whose processes srun did not start.

    Lightning itself would wait for them wherever it sees a job of Slurm, also inside `salloc`.

    Raises:
        SettingsError: srun has started another number of processes.
    """
    num_tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)  # srun alone sets it
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []
    if num_tasks == 1:
        return [LightningEnvironment()]
    if num_tasks != num_processes or "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise SettingsError(
            f"srun has started {num_tasks} processes (SLURM_STEP_NUM_TASKS); expected "
            f"{num_processes}, as --devices times --nodes says, by --ntasks-per-node. Change "
            "one of them."
        )
    return []


def trainer_of(settings: Settings, run: Path, callbacks: list[Callback]) -> L.Trainer:
    """The Trainer of a training run.

    Raises:
        MissingPackageError: the tracker's package is not installed.
    """
    optimization, runtime = settings.optimization, settings.runtime
    return make_trainer(
        run,
        callbacks,
        devices=runtime.devices,
        nodes=runtime.nodes,
        max_epochs=optimization.epochs,
        precision=optimization.precision,
        gradient_clip_val=optimization.gradient_clip,
        accumulate_grad_batches=optimization.accumulate_batches,
        logger=_loggers(settings, run),
    )


def _loggers(settings: Settings, run: Path) -> list[Logger]:
    """The logger that `--track` asks for, beside metrics.csv.

    Raises:
        MissingPackageError: its package is not installed.
    """
    loggers: list[Logger] = []
    try:
        if settings.runtime.track == "tensorboard":
            loggers.append(TensorBoardLogger(run, name="", version="tensorboard"))
        elif settings.runtime.track == "mlflow":
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # usage data for its makers
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
