"""Epochs of training on a GPU: images that worker processes decode and augment."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.callbacks import Callback
from PIL import Image

from benchmarks.gpu_watch import watched_gpu
from benchmarks.training_gpu_steps import VARIANTS, GpuBenchmarkSettings, Row, Stepper
from benchmarks.training_model import training_settings
from train.data.folder import read_tile_folder
from train.data.synthetic.dataset import SyntheticSettings, write_dataset
from train.data.synthetic.tissue import CLASSES
from train.fitting.loaders import make_loaders
from train.fitting.run import at_scale
from train.fitting.task import SegmentationTask
from train.fitting.timing import seconds_now, timed_trainer
from train.model.segmenter import Segmenter
from train.settings import Settings


def measure_loaders(settings: GpuBenchmarkSettings, folder: Path) -> Iterator[Row]:
    """Epochs of the bcss preset, frozen encoders, with images that workers decode."""
    training = training_settings(settings.image_encoder, settings.tile_size_px, frozen=True)
    batch_size = training.optimization.batch_size
    stepper = Stepper(settings, VARIANTS["frozen"])
    step_s = stepper.measure(batch_size, settings.repeats)["step_s"]
    del stepper
    for name in settings.formats:
        data = write_tiles(
            folder / name, name, settings.num_batches * batch_size, settings.tile_size_px
        )
        for num_workers in settings.num_workers:
            augmented = replace(training.augmentation, num_workers=num_workers)
            clock = _Clock(skip=min(2 * num_workers, settings.num_batches // 2))
            with watched_gpu() as gpu:
                _epoch(replace(training, augmentation=augmented), data, clock)
            per_step, seen = clock.seconds_per_step, gpu.use(since=clock.start)
            yield {
                "format": name,
                "workers": num_workers,
                "batch_size": batch_size,
                "tiles_per_s": batch_size / per_step,
                "step_s": step_s,
                "busy": min(1.0, step_s / per_step),
                "utilisation": None if seen is None else seen.busy,
            }


def _epoch(training: Settings, data: Path, clock: Callback) -> None:
    found = read_tile_folder(data)
    training = at_scale(training, found, ("training",))
    task = SegmentationTask(Segmenter(training.model, len(CLASSES)), training, found.classes)
    trainer = timed_trainer(
        clock,
        precision=training.optimization.precision,
        gradient_clip=training.optimization.gradient_clip,
    )
    counts = np.zeros((len(found.tiles["training"]), len(CLASSES)), np.int64)
    loader, _ = make_loaders(found, training, task.segmenter, trainer, 0, counts)
    trainer.fit(task, loader)


class _Clock(Callback):
    """Times the steps after the first ones, whose tiles were loaded while workers started."""

    def __init__(self, skip: int) -> None:
        self._skip, self.start, self._end, self._num_steps = skip, 0.0, 0.0, 0

    def on_train_start(self, *given: Any) -> None:
        self.start = seconds_now()

    def on_train_batch_end(self, *given: Any) -> None:
        if self._skip > 0:
            self._skip -= 1
            if not self._skip:
                self.start = seconds_now()
            return
        self._num_steps += 1

    def on_train_end(self, *given: Any) -> None:
        self._end = seconds_now()

    @property
    def seconds_per_step(self) -> float:
        return (self._end - self.start) / max(1, self._num_steps)


def write_tiles(folder: Path, suffix: str, num_tiles: int, side: int, num_drawn: int = 6) -> Path:
    """Write a data set whose tiles are links to a few drawn ones: each is decoded as its own."""
    drawn = folder.parent / f"drawn{side}"
    recipe = SyntheticSettings(
        num_train=num_drawn, num_validation=0, num_test=0, tile_size_px=side, mpp=0.25
    )
    write_dataset(drawn, recipe)
    names = sorted(path.stem for path in (drawn / "img").iterdir())
    originals: Sequence[Path] = [drawn / "img" / f"{name}.png" for name in names]
    for part in ("img", "mask"):
        (folder / part).mkdir(parents=True)
    if suffix == "jpg":
        originals = [_as_jpeg(path, folder) for path in originals]
    lines = ["img_id,fold"]
    for number in range(num_tiles):
        of = number % num_drawn
        os.link(originals[of], folder / "img" / f"t{number}.{suffix}")
        os.link(drawn / "mask" / f"{names[of]}.png", folder / "mask" / f"t{number}.png")
        lines.append(f"t{number},1")
    (folder / "folds.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "dataset.json").write_bytes((drawn / "dataset.json").read_bytes())
    return folder


def _as_jpeg(path: Path, folder: Path) -> Path:
    written = folder / f"{path.stem}.jpg"
    Image.open(path).save(written, quality=90)
    return written
