"""How fast views are read, and how fast a step is: which of the two a run would wait for."""

import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, Dataset

from train.fitting.trainer import make_trainer
from train.pretraining.run import view_loader
from train.pretraining.settings import PretrainSettings
from train.pretraining.sources import open_source
from train.pretraining.split_source import usable_slides
from train.pretraining.task import PretrainTask


@dataclass(frozen=True)
class Speed:
    """Medians over the steps that were measured."""

    load_s: float
    """Seconds to read the views of a step, while nothing else runs."""
    step_s: float
    """Seconds of a step whose views are read already."""

    @property
    def text(self) -> str:
        """Both, and their ratio, for people."""
        return (
            f"views of a step: {1000 * self.load_s:.0f} ms, step: {1000 * self.step_s:.0f} ms; "
            f"reading is {self.step_s / self.load_s:.1f} times as fast as training"
        )


def measure_speed(settings: PretrainSettings, data: Path, num_steps: int) -> Speed:
    """Read and train a few steps on one device, and write nothing.

    The first step of each is left out: it decodes images and sets up what later ones use.

    Args:
        settings: the run's.
        data: its slides.
        num_steps: how many steps to time.

    Raises:
        FocalPathError: the data or the settings cannot be used.
    """
    found = open_source(data)
    slides = usable_slides(found, found.slides["training"], settings.views)
    L.seed_everything(settings.schedule.seed, workers=True, verbose=False)
    task = PretrainTask(settings)
    loader: DataLoader[Any] = view_loader(found, slides, settings, task.patch_size)
    batches, load_s, before = [], [], time.perf_counter()
    for batch in islice(loader, num_steps + 1):
        load_s.append(time.perf_counter() - before)
        batches.append(batch)
        before = time.perf_counter()
    clock = _Clock()
    trainer = make_trainer(
        Path.cwd(),
        [clock],
        devices=1,
        epochs=1,
        precision=settings.schedule.precision,
        gradient_clip=settings.schedule.gradient_clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=0,
    )
    trainer.fit(task, DataLoader(cast("Dataset[Any]", batches), batch_size=None))
    return Speed(median(load_s[1:]), median(clock.seconds[1:]))


class _Clock(Callback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *given: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *given: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)
