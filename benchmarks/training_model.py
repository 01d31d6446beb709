"""The model that the benchmarks of training train, with random weights, and its learning."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.optim import AdamW

from serve.contract.machine import peak_memory_mib, this_processor
from train.data.synthetic.tissue import CLASSES
from train.fitting.losses import SegmentationLoss
from train.model.segmenter import Segmenter
from train.presets import bcss
from train.settings import ModelSettings, Settings

Encoder = Literal["tiny", "vit_b", "vit_l", "vit_h"]


def training_settings(image_encoder: Encoder, tile_size_px: int, *, frozen: bool) -> Settings:
    """The bcss preset at a benchmark's size, in one epoch."""
    preset = bcss()
    small = image_encoder == "tiny"
    model = ModelSettings(
        tile_size_px=tile_size_px,
        image_encoder=image_encoder,
        pathology_encoder="vit_tiny_patch16_224" if small else "vit_small_patch16_224",
        encoders_frozen=frozen,
    )
    optimization = replace(preset.optimization, accumulate_batches=1, epochs=1)
    return replace(preset, model=model, optimization=optimization)


class Learner:
    """A model with its loss and its optimizer, on the GPU where there is one."""

    def __init__(self, training: Settings) -> None:
        torch.manual_seed(0)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.segmenter = Segmenter(training.model, len(CLASSES)).train().to(self.device)
        self.loss = SegmentationLoss(training.loss)
        trained = [p for p in self.segmenter.parameters() if p.requires_grad]
        self.optimizer = AdamW(trained, lr=1e-4)

    def learn(self, loss: Tensor) -> float:
        """Learn from a loss, and wait for its value."""
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def machine() -> str:
    """The GPU's name, or the processor's and the threads that torch uses."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"{this_processor().name}, {torch.get_num_threads()} threads"


def peak_memory_gib() -> float:
    """Most GPU memory that tensors took, or without a GPU that the whole process took so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_memory_mib() / 1024
