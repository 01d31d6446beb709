"""The model and the tiles of the benchmarks: real size, random weights."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from train.data.synthetic.tissue import make_tile
from train.model.segmenter import Segmenter
from train.settings import ModelSettings

NUM_CLASSES = 6
FLOPS_PER_TILE = 1.45e12
"""Operations of SAM's ViT-B, the ViT-S, neck and decoder on a tile of 1024 pixels."""


def build_benchmark_model(settings: ModelSettings) -> Segmenter:
    """Build a model whose weights depend only on the settings.

    Its bias is zero, because SAM-Path has none to compare with.
    """
    torch.manual_seed(0)
    segmenter = Segmenter(settings, NUM_CLASSES).eval()
    with torch.no_grad():
        for name, parameter in segmenter.named_parameters():
            # SAM initialises its positions to zero; a trained model has other values.
            if "rel_pos" in name or "pos_embed" in name:
                nn.init.normal_(parameter, std=0.02)
    return segmenter


def model_line(settings: ModelSettings) -> str:
    """Describe the model, for the head of a report."""
    return (
        f"{settings.image_encoder} + {settings.pathology_encoder}, {NUM_CLASSES} classes, random "
        "weights"
    )


def draw_tiles(num_tiles: int, tile_size_px: int) -> NDArray[np.uint8]:
    """Draw tiles of synthetic tissue: (N, H, W, 3) uint8 RGB."""
    rng = np.random.default_rng(0)
    return np.stack([make_tile(rng, tile_size_px)[0] for _ in range(num_tiles)])
