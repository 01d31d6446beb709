"""Measures how fast views are read and how fast a step is, to find the bottleneck."""

import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, Dataset

from train.errors import SettingsError
from train.fitting.timing import seconds_now, timed_trainer
from train.pretraining.run import view_loader
from train.pretraining.settings import PretrainSettings
from train.pretraining.sources import open_source
from train.pretraining.split_source import usable_slides
from train.pretraining.task import PretrainTask

_PREFETCHED = 2
"""Batches that each loading process prepares in advance: torch's default."""


@dataclass(frozen=True)
class Speed:
    """Means of reading, and medians of steps."""

    load_s: float
    """Seconds to read the views of a step, while nothing else runs."""
    step_s: float
    """Seconds of a step whose views are read already."""
    batch_size: int
    """Samples of a step."""
    memory_gib: float | None
    """Largest memory of a GPU's tensors during the steps; None on a CPU."""

    @property
    def text(self) -> str:
        """All measurements as text."""
        memory = "" if self.memory_gib is None else f", {self.memory_gib:.1f} GiB on the GPU"
        return (
            f"views of a step: {1000 * self.load_s:.0f} ms, step: {1000 * self.step_s:.0f} ms "
            f"({self.batch_size / self.step_s:.0f} samples per second{memory}); "
            f"reading is {self.step_s / self.load_s:.1f} times as fast as training"
        )


def measure_speed(
    settings: PretrainSettings, data: Path, num_steps: int, folds: Path | None = None
) -> Speed:
    """Read and train a few steps on one device, and write nothing.

    The first step is left out, as it sets up what later ones use, and so are the batches that
    loading processes make while they start: those are there all at once.

    Args:
        settings: the run's.
        data: its slides.
        num_steps: how many steps to time.
        folds: a folds.csv that counts in place of the source's own.

    Raises:
        FocalPathError: the data or the settings cannot be used.
    """
    if num_steps < 1:
        raise SettingsError(f"--measure-steps is {num_steps}; expected at least 1")
    found = open_source(data, folds)
    slides = usable_slides(found, found.slides["training"], settings.views)
    L.seed_everything(settings.schedule.seed, workers=True, verbose=False)
    task = PretrainTask(settings)
    loader: DataLoader[Any] = view_loader(found, slides, settings, task.patch_size)
    num_first = 1 + _PREFETCHED * settings.schedule.num_workers
    batches: list[Any] = []
    read_at: list[float] = []
    for batch in islice(loader, num_first + num_steps):
        read_at.append(time.perf_counter())
        if len(batches) <= num_steps:
            batches.append(batch)
    first = min(num_first, len(read_at) - 1) - 1
    clock = _Clock()
    trainer = timed_trainer(
        clock,
        precision=settings.schedule.precision,
        gradient_clip=settings.schedule.gradient_clip,
    )
    trainer.fit(task, DataLoader(cast("Dataset[Any]", batches), batch_size=None))
    return Speed(
        load_s=(read_at[-1] - read_at[first]) / (len(read_at) - 1 - first),
        step_s=median(clock.seconds[1:]),
        batch_size=settings.schedule.batch_size,
        memory_gib=torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    )


class _Clock(Callback):
    """Times whole steps, including the work that a GPU still has to finish."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *given: Any) -> None:
        self._start = seconds_now()

    def on_train_batch_end(self, *given: Any) -> None:
        self.seconds.append(seconds_now() - self._start)
