"""Tiles as vectors: read at a scale, optionally colour-matched, encoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from train.pretraining.footprints import Footprint
from train.pretraining.regions import RegionSource

Floats = NDArray[np.float32]
Square = tuple[int, Footprint]
"""A slide's number, and a square of it."""

_BATCH = 64


@dataclass(frozen=True)
class ColorTarget:
    """Mean and deviation of optical density per channel, that tiles are brought to."""

    mean: Floats
    deviation: Floats


def color_target(pictures: Sequence[NDArray[np.uint8]]) -> ColorTarget:
    """The mean over tiles of each channel's mean and deviation of optical density."""
    densities = [_density(picture) for picture in pictures]
    mean = np.mean([d.mean(axis=(0, 1)) for d in densities], axis=0)
    deviation = np.mean([d.std(axis=(0, 1)) for d in densities], axis=0)
    return ColorTarget(mean.astype(np.float32), deviation.astype(np.float32))


def color_matched(picture: NDArray[np.uint8], target: ColorTarget) -> NDArray[np.uint8]:
    """Bring a tile's optical density to the target's mean and deviation per channel.

    What is left is texture and shape: mean colour survives any change of scale, and on H&E it goes
    a long way, also for an untrained network.

    Args:
        picture: (H, W, 3) uint8 RGB.
        target: what to bring it to.
    """
    density = _density(picture)
    deviation = density.std(axis=(0, 1))
    unit = (density - density.mean(axis=(0, 1))) / np.maximum(deviation, 1e-4)
    matched = unit * target.deviation + target.mean
    return np.asarray(np.clip(np.rint(256 * np.exp(-matched) - 1), 0, 255), np.uint8)


def _density(picture: NDArray[np.uint8]) -> Floats:
    return np.asarray(-np.log((picture.astype(np.float32) + 1) / 256), np.float32)


def read_squares(
    source: RegionSource, squares: Sequence[Square], size_px: int
) -> list[NDArray[np.uint8]]:
    """Read squares of slides as (size_px, size_px, 3) uint8."""
    return [source.read(slide, square, size_px) for slide, square in squares]


@torch.inference_mode()
def encode(encoder: nn.Module, pictures: Sequence[NDArray[np.uint8]]) -> tuple[Floats, Floats]:
    """Encode tiles with a timm vision transformer.

    Args:
        encoder: its `pretrained_cfg` has the mean and deviation that it takes.
        pictures: N tiles (H, W, 3) uint8, all of one size.

    Returns:
        Class tokens (N, D) and patch tokens (N, P, D), after the final norm.
    """
    vit = cast(Any, encoder)
    device = next(encoder.parameters()).device
    mean = torch.tensor(vit.pretrained_cfg["mean"], device=device).reshape(3, 1, 1) * 255
    std = torch.tensor(vit.pretrained_cfg["std"], device=device).reshape(3, 1, 1) * 255
    classes, patches = [], []
    for start in range(0, len(pictures), _BATCH):
        batch = torch.from_numpy(np.stack(pictures[start : start + _BATCH])).to(device)
        tokens = vit.forward_features((batch.permute(0, 3, 1, 2).float() - mean) / std)
        classes.append(tokens[:, 0].float().cpu().numpy())
        patches.append(tokens[:, vit.num_prefix_tokens :].float().cpu().numpy())
    return np.concatenate(classes), np.concatenate(patches)


def embed(encoder: nn.Module, pictures: Sequence[NDArray[np.uint8]]) -> Floats:
    """A tile's embedding, (N, 2 D): the class token, and the mean of the patch tokens.

    As in arXiv 2601.02198.
    """
    classes, patches = encode(encoder, pictures)
    return np.concatenate([classes, patches.mean(axis=1)], axis=1)
