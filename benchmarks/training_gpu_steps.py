"""Steps of training on a GPU: one batch that lies there, variants beside each other."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor

from benchmarks.direct_sam_path import DirectDecoder
from benchmarks.harness import seconds_of
from benchmarks.training_model import Encoder, Learner, peak_memory_gib, training_settings
from train.checked import CheckedSettings, Count, NumberOf
from train.data.synthetic.tissue import CLASSES
from train.model.segmenter import Segmenter, encode_for_training

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
    image_encoder: Encoder = "vit_b"
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


class Stepper(Learner):
    """A model that takes steps of random tiles."""

    def __init__(self, settings: GpuBenchmarkSettings, variant: Variant) -> None:
        size = settings.image_encoder, settings.tile_size_px
        super().__init__(training_settings(*size, frozen=not variant.trained))
        self.variant, self.side = variant, settings.tile_size_px
        if variant.sams_attention:
            _take_sams_attention(self.segmenter)
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
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        median = statistics.median(
            seconds_of(lambda: self.step(images, labels)) for _ in range(repeats)
        )
        return {
            "step_s": median,
            "tiles_per_s": batch_size / median,
            "memory_gib": peak_memory_gib(),
        }

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
        self.learn(loss)


def _take_sams_attention(segmenter: Segmenter) -> None:
    for module in segmenter.image_encoder.modules():
        if isinstance(module, Attention):
            module.__class__ = Attention
