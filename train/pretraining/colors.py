"""Stain jitter and blur of views, drawn where they are read, applied on the training device."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.pretraining.settings import ViewSettings

NUM_COLORS = 6


def draw_colors(
    rng: np.random.Generator, mpp: float, settings: ViewSettings
) -> NDArray[np.float32]:
    """Draw one view's stain jitter and blur.

    Returns:
        (6,) float32: gain of each channel's mean optical density (3), contrast of its deviations,
        1 for grey, and the blur's sigma in pixels.
    """
    strength = settings.stain_jitter
    gains = rng.uniform(1 - 0.6 * strength, 1 + 0.6 * strength, 3)
    contrast = rng.uniform(1 - 0.4 * strength, 1 + 0.4 * strength)
    grey = float(rng.random() < 0.3 * strength)
    sigma_px = rng.uniform(0.1, 0.5) / mpp if rng.random() < 0.3 else 0.0
    return np.array([*gains, contrast, grey, sigma_px], np.float32)


def change_colors(views: Tensor, colors: Tensor) -> Tensor:
    """Apply stain jitter in optical density, then blur, each view by its own draw.

    Args:
        views: (B, 3, H, W) uint8 RGB in [0, 255].
        colors: (B, 6) float32 of `draw_colors`.

    Returns:
        (B, 3, H, W) float32 in [0, 255].
    """
    density = -torch.log((views.float() + 1) / 256)
    mean = density.mean(dim=(2, 3), keepdim=True)
    changed = mean * colors[:, :3, None, None] + (density - mean) * colors[:, 3:4, None, None]
    grey = changed.mean(dim=1, keepdim=True).expand_as(changed)
    changed = torch.where(colors[:, 4, None, None, None] > 0, grey, changed)
    light = (256 * torch.exp(-changed) - 1).clamp(0, 255)
    with torch.autocast(views.device.type, enabled=False):  # bfloat16 has fewer than 255 levels
        return _blurred(light, colors[:, 5])


def _blurred(views: Tensor, sigma_px: Tensor) -> Tensor:
    """Gaussian blur of each view with its own sigma; 0 leaves a view unchanged."""
    blurred = (sigma_px > 0).nonzero().squeeze(1)
    if not len(blurred):
        return views
    sigma = sigma_px[blurred].clamp(min=1e-3)
    radius = max(1, int(torch.ceil(3 * sigma.max()).item()))
    offsets = torch.arange(-radius, radius + 1, device=views.device, dtype=views.dtype)
    kernels = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernels = (kernels / kernels.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)
    count, _, height, width = views[blurred].shape
    flat = views[blurred].reshape(1, count * 3, height, width)
    flat = torch.nn.functional.pad(flat, [radius] * 4, mode="reflect")
    flat = torch.nn.functional.conv2d(flat, kernels[:, None, None, :], groups=count * 3)
    flat = torch.nn.functional.conv2d(flat, kernels[:, None, :, None], groups=count * 3)
    return views.index_copy(0, blurred, flat.reshape(count, 3, height, width))
