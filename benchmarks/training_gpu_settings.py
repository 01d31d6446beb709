"""Options of the benchmark of training on a GPU, and the training that it measures."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from train.checked import CheckedSettings, Count, NumberOf
from train.presets import bcss
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


def device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def training_settings(settings: GpuBenchmarkSettings, *, frozen: bool) -> Settings:
    """The bcss preset at the benchmark's size, in one epoch."""
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
