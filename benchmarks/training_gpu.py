"""Measures training on a GPU: steps by batch size, epochs with real loaders, and pretraining.

    steps        one step of a batch that lies on the GPU, variants beside each other
    loaders      Lightning's loop over images that worker processes decode and augment
    pretraining  the gpu preset of `train pretrain`

Without a GPU everything runs on the CPU, to try it out: with small sizes, it says nothing.
"""

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from lightning.pytorch.callbacks import Callback
from PIL import Image
from rich.console import Console
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor
from torch.optim import AdamW

from benchmarks.direct_sam_path import DirectDecoder
from benchmarks.harness import one_line_errors, seconds_of, write_report
from benchmarks.training import machine
from benchmarks.training_gpu_report import markdown
from serve.contract.machine import peak_memory_mib, usable_cpus
from train.checked import CheckedSettings, Count, NumberOf
from train.data.folder import read_tile_folder
from train.data.synthetic.dataset import SyntheticSettings, write_dataset
from train.data.synthetic.slides import SlideSettings, write_slides
from train.data.synthetic.tissue import CLASSES
from train.fitting.loaders import make_loaders
from train.fitting.losses import SegmentationLoss
from train.fitting.run import at_scale
from train.fitting.task import SegmentationTask
from train.fitting.timing import seconds_now, timed_trainer
from train.model.segmenter import Segmenter, encode_for_training
from train.presets import bcss
from train.pretraining.settings import gpu
from train.pretraining.speed import measure_speed
from train.settings import ModelSettings, Settings

Part = Literal["steps", "loaders", "pretraining"]
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class GpuBenchmarkSettings(CheckedSettings):
    """Options of the benchmark."""

    parts: tuple[Part, ...] = ("steps", "loaders", "pretraining")
    """What to measure."""
    variants: tuple[str, ...] = ()
    """Steps to measure, by their names in VARIANTS; all that need no compiler without."""
    batch_sizes: tuple[Count, ...] = (1, 2, 4, 8, 16)
    """Tiles per step; a variant ends at the first that does not fit the memory."""
    repeats: Count = 5
    """Steps that are timed, after two that are not; the median counts."""
    tile_size_px: int = 1024
    """Side of the tiles."""
    image_encoder: Literal["tiny", "vit_b", "vit_l", "vit_h"] = "vit_b"
    """SAM's encoder."""
    num_workers: tuple[NumberOf, ...] = (4, 16)
    """Processes that decode and augment."""
    formats: tuple[Literal["png", "jpg"], ...] = ("png", "jpg")
    """Of the images on the disk."""
    num_batches: Count = 64
    """Steps of an epoch with loaders."""
    slide_um: float = 400.0
    """Side of the drawn slides of the pretraining."""
    pretraining_batch: Count = 128
    """Samples per step of the pretraining."""
    pretraining_steps: Count = 16
    """Steps that are timed."""
    out: Path = Path("artifacts/results/train_gpu")
    """Folder to write benchmark.json and benchmark.md to."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to take a step."""

    title: str
    trained: bool = False
    """Whether the encoders learn."""
    mixed: bool = False
    """bfloat16 in the decoder, and in trained encoders; frozen ones always have it on a GPU."""
    sams_attention: bool = False
    """SAM's own attention in the image encoder, which writes all logits to memory."""
    direct: bool = False
    """Encoders in float32, then image by image through SAM's own decoder."""
    compiled: bool = False


VARIANTS = {
    "direct": Variant(title="direct SAM-Path loop", sams_attention=True, direct=True),
    "frozen_sam": Variant(title="ours, frozen encoders, SAM's attention", sams_attention=True),
    "frozen": Variant(title="ours, frozen encoders"),
    "frozen_bf16": Variant(title="ours, frozen encoders, bf16-mixed", mixed=True),
    "trained_bf16_sam": Variant(
        title="ours, trained encoders, bf16-mixed, SAM's attention",
        trained=True,
        mixed=True,
        sams_attention=True,
    ),
    "trained_bf16": Variant(title="ours, trained encoders, bf16-mixed", trained=True, mixed=True),
    "frozen_compiled": Variant(
        title="ours, frozen encoders, bf16-mixed, compiled", mixed=True, compiled=True
    ),
    "trained_compiled": Variant(
        title="ours, trained encoders, bf16-mixed, compiled",
        trained=True,
        mixed=True,
        compiled=True,
    ),
}


@dataclass
class Report:
    """What was measured."""

    machine: str
    cpus: int
    torch: str
    settings: dict[str, Any]
    steps: list[Row] = field(default_factory=list)
    loaders: list[Row] = field(default_factory=list)
    pretraining: list[Row] = field(default_factory=list)


def run_benchmark(settings: GpuBenchmarkSettings) -> Report:
    """Measure, and write what is there after each part, so that an interruption loses one."""
    options = {name: value for name, value in asdict(settings).items() if name != "out"}
    report = Report(machine(), usable_cpus(), torch.__version__, options)
    parts: dict[Part, Callable[..., Iterator[Row]]] = {
        "steps": measure_steps,
        "loaders": measure_loaders,
        "pretraining": measure_pretraining,
    }
    console = Console(soft_wrap=True, highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        for part in settings.parts:
            for row in parts[part](settings, Path(folder)):
                getattr(report, part).append(row)
                console.print(" ".join(f"{name}={_short(v)}" for name, v in row.items()))
                content = asdict(report)
                write_report(settings.out, "benchmark", content, markdown(content))
    return report


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure_steps(settings: GpuBenchmarkSettings, folder: Path) -> Iterator[Row]:
    """Steps of every variant at growing batch sizes."""
    names = settings.variants or [n for n, v in VARIANTS.items() if not v.compiled]
    for name in names:
        stepper = Stepper(settings, VARIANTS[name])
        for batch_size in settings.batch_sizes:
            row: Row = {"variant": VARIANTS[name].title, "batch_size": batch_size}
            try:
                found = stepper.measure(batch_size, settings.repeats)
            except torch.OutOfMemoryError:
                yield {**row, "out_of_memory": True}
                break
            yield {**row, **found}
        del stepper
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Stepper:
    """A model and its optimizer, which take steps of random tiles."""

    def __init__(self, settings: GpuBenchmarkSettings, variant: Variant) -> None:
        """Build the model with random weights, on the GPU."""
        torch.manual_seed(0)
        self.variant, self.side, self.device = variant, settings.tile_size_px, device()
        training = training_settings(settings, frozen=not variant.trained)
        self.segmenter = Segmenter(training.model, len(CLASSES)).train().to(self.device)
        if variant.sams_attention:
            _take_sams_attention(self.segmenter)
        self.loss = SegmentationLoss(training.loss)
        trained = [p for p in self.segmenter.parameters() if p.requires_grad]
        self.optimizer = AdamW(trained, lr=1e-4)
        self.direct_decoder = DirectDecoder(self.segmenter) if variant.direct else None
        if variant.compiled:
            for part in (*self.segmenter.parts, self.loss):
                part.compile()

    def measure(self, batch_size: int, repeats: int) -> Row:
        """Median seconds of a step, tiles per second, and the largest memory in use."""
        generator = torch.Generator().manual_seed(0)
        size = (batch_size, 3, self.side, self.side)
        images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, 1 + len(CLASSES), (batch_size, *size[2:]), generator=generator)
        images, labels = images.to(self.device), labels.to(self.device)
        for _ in range(2):
            self.step(images, labels)
        with peak_memory() as peak:
            seconds = [seconds_of(lambda: self.step(images, labels)) for _ in range(repeats)]
        median = statistics.median(seconds)
        return {"step_s": median, "tiles_per_s": batch_size / median, "memory_gib": peak[0]}

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Encode, decode, learn, and wait for the GPU."""
        mixed = self.variant.mixed
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
            if self.direct_decoder is not None:
                with torch.no_grad():
                    features = self.segmenter.encode(images.float())
                output = self.direct_decoder(features)
            else:
                features = encode_for_training(self.segmenter, images, mixed_precision=mixed)
                output = self.segmenter.decode(features.float())
            loss = self.loss(output, labels)["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()


def _take_sams_attention(segmenter: Segmenter) -> None:
    for module in segmenter.image_encoder.modules():
        if isinstance(module, Attention):
            module.__class__ = Attention


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """GiB that tensors took at most, at the end; without a GPU, of the whole process so far."""
    found: list[float] = []
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    yield found
    gpus = torch.cuda.is_available()
    found.append(torch.cuda.max_memory_allocated() / 2**30 if gpus else peak_memory_mib() / 1024)


def measure_loaders(settings: GpuBenchmarkSettings, folder: Path) -> Iterator[Row]:
    """Epochs of the bcss preset, frozen encoders, with images that workers decode."""
    training = training_settings(settings, frozen=True)
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
            clock, seen = (
                _Clock(skip=min(2 * num_workers, settings.num_batches // 2)),
                Utilisation(),
            )
            with seen:
                _epoch(replace(training, augmentation=augmented), data, clock)
            per_step = clock.seconds_per_step
            yield {
                "format": name,
                "workers": num_workers,
                "batch_size": batch_size,
                "tiles_per_s": batch_size / per_step,
                "step_s": step_s,
                "busy": min(1.0, step_s / per_step),
                "utilisation": seen.after(clock.start),
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


class Utilisation:
    """Asks NVIDIA's driver while it is entered: the share of the time in which a kernel ran."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, float]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Utilisation":
        self._thread.start()
        return self

    def __exit__(self, *given: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        try:
            while torch.cuda.is_available() and not self._done.wait(0.1):
                self._seen.append((time.perf_counter(), torch.cuda.utilization() / 100))
        except (ModuleNotFoundError, RuntimeError):  # no nvidia-ml-py, or a driver without it
            self._seen.clear()

    def after(self, start: float) -> float | None:
        """The mean since `start`; None where the driver does not tell."""
        values = [value for at, value in self._seen if at > start]
        return statistics.mean(values) if values else None


def measure_pretraining(settings: GpuBenchmarkSettings, folder: Path) -> Iterator[Row]:
    """The gpu preset on drawn slides."""
    slides = folder / "slides"
    drawn = SlideSettings(num_train=3, num_validation=0, num_test=0, side_um=settings.slide_um)
    write_slides(slides, drawn)
    preset = gpu()
    schedule = replace(
        preset.schedule,
        batch_size=settings.pretraining_batch,
        num_workers=max(settings.num_workers),
    )
    speed = measure_speed(replace(preset, schedule=schedule), slides, settings.pretraining_steps)
    yield {
        "preset": preset.preset,
        "batch_size": speed.batch_size,
        "workers": schedule.num_workers,
        "step_s": speed.step_s,
        "samples_per_s": speed.batch_size / speed.step_s,
        "loaded_per_s": speed.batch_size / speed.load_s,
        "memory_gib": speed.memory_gib,
    }


def training_settings(settings: GpuBenchmarkSettings, *, frozen: bool) -> Settings:
    """The bcss preset at the benchmark's size, without an IoU loss left out."""
    preset = bcss()
    small = settings.image_encoder == "tiny"
    model = ModelSettings(
        tile_size_px=settings.tile_size_px,
        image_encoder=settings.image_encoder,
        pathology_encoder="vit_tiny_patch16_224" if small else "vit_small_patch16_224",
        encoders_frozen=frozen,
    )
    optimization = replace(preset.optimization, accumulate_batches=1, epochs=1)
    return replace(preset, model=model, optimization=optimization)


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


@one_line_errors()
def main() -> None:
    """Run the benchmark."""
    config = (tyro.conf.OmitArgPrefixes,)
    prog = "python -m benchmarks.training_gpu"
    run_benchmark(tyro.cli(GpuBenchmarkSettings, prog=prog, config=config))


if __name__ == "__main__":
    main()
