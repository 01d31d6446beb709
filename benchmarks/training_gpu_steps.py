"""Steps of training on a GPU: one batch that lies there, variants beside each other."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor
from torch.optim import AdamW

from benchmarks.direct_sam_path import DirectDecoder
from benchmarks.harness import seconds_of
from benchmarks.training_gpu_settings import GpuBenchmarkSettings, Row, device, training_settings
from serve.contract.machine import peak_memory_mib
from train.data.synthetic.tissue import CLASSES
from train.fitting.losses import SegmentationLoss
from train.model.segmenter import Segmenter, encode_for_training


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
