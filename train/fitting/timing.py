"""A Trainer and a clock for steps that are timed and leave nothing behind."""

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from train.fitting.trainer import make_trainer


def timed_trainer(clock: Callback, *, precision: Any, gradient_clip: float) -> L.Trainer:
    """Build a Trainer of one epoch on one device that writes, logs and shows nothing."""
    return make_trainer(
        Path.cwd(),
        [clock],
        devices=1,
        max_epochs=1,
        precision=precision,
        gradient_clip_val=gradient_clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=0,
    )


def seconds_now() -> float:
    """Time in seconds, once a GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
