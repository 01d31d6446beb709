"""How a training tile is varied: where it is cut, and its colours. Flips and turns are `turn`.

Everything that changes pixels happens after the cut, on the tile alone.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.settings import AugmentationSettings

NUM_VIEWS = 8
"""Flips and quarter turns of a square."""
_MOST_DRAWS = 10
"""Windows that are drawn until one fits and has a labelled pixel (our choice)."""
_ASPECT = (3 / 4, 4 / 3)
"""Width by height of a crop, as torchvision's RandomResizedCrop draws it."""
_GRAY = np.array([0.299, 0.587, 0.114], np.float32)
_YIQ = np.array(
    [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], np.float32
)
_STAINS = np.array(
    [[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], np.float32
)  # haematoxylin, eosin, residual: optical density in R, G, B
_STAINS_OF_RGB = np.linalg.inv(_STAINS)
_OPTICAL_DENSITY = torch.from_numpy(-np.log((np.arange(256, dtype=np.float32) + 1) / 256))
"""Of each value of a channel; 255 has none."""


def turn(pixels: Tensor, view: int) -> Tensor:
    """Flip and turn (..., H, W) by a view in 0..7; view 0 leaves it as it is."""
    flipped = pixels.flip(-1) if view >= 4 else pixels
    return torch.rot90(flipped, view % 4, dims=(-2, -1))


def turn_back(pixels: Tensor, view: int) -> Tensor:
    """Undo `turn`."""
    turned = torch.rot90(pixels, -(view % 4), dims=(-2, -1))
    return turned.flip(-1) if view >= 4 else turned


def draw_window(
    rng: np.random.Generator,
    labels: NDArray[np.uint8],
    size: tuple[float, float],
    scale_min: float,
) -> tuple[slice, slice]:
    """Draw where a tile is cut from an image.

    Args:
        rng: Source of chance.
        labels: (H, W) of the image, at least of `size`; a window without any label is drawn again.
        size: Height and width of a whole tile in pixels of the image.
        scale_min: Smallest share of the tile's area; 1 draws whole tiles.
    """
    for _ in range(_MOST_DRAWS):
        height, width = (max(1, round(length)) for length in _crop_size(rng, size, scale_min))
        top = int(rng.integers(0, labels.shape[0] - height + 1))
        left = int(rng.integers(0, labels.shape[1] - width + 1))
        window = slice(top, top + height), slice(left, left + width)
        if labels[window].any():
            break
    return window


def _crop_size(
    rng: np.random.Generator, size: tuple[float, float], scale_min: float
) -> tuple[float, float]:
    """Height and width of a crop that is within `size`, as torchvision's RandomResizedCrop."""
    if scale_min >= 1:
        return size
    for _ in range(_MOST_DRAWS):
        share = rng.uniform(scale_min, 1)
        aspect = math.exp(rng.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        height, width = math.sqrt(share / aspect), math.sqrt(share * aspect)
        if height <= 1 and width <= 1:
            return height * size[0], width * size[1]
    return size


def vary_colors(image: Tensor, rng: np.random.Generator, settings: AugmentationSettings) -> Tensor:
    """Vary the colours of a (3, H, W) uint8 image.

    First the amount of each stain, then brightness, contrast, saturation and hue.
    """
    varied = image.reshape(3, -1)
    if settings.stain_jitter:
        varied = _vary_stains(varied, rng, settings.stain_jitter)
    if settings.color_jitter:
        varied = _vary_light(varied.float(), rng, settings.color_jitter)
    return varied.clamp(0, 255).round().to(torch.uint8).reshape(image.shape)


def _vary_light(pixels: Tensor, rng: np.random.Generator, strength: float) -> Tensor:
    """Brightness, contrast, saturation and hue of (3, P) float32 pixels, as one affine map.

    Hue is turned in YIQ, where it is a rotation, and not in HSV as torchvision does it: that
    takes most of the time of a tile, for the same kind of change (our choice).
    """
    brightness, contrast, saturation = 1 + rng.uniform(-strength, strength, 3)
    angle = 2 * math.pi * rng.uniform(-strength, strength)
    cos, sin = math.cos(angle) * saturation, math.sin(angle) * saturation
    chroma = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]], np.float32)
    matrix = np.linalg.inv(_YIQ) @ chroma @ _YIQ * (brightness * contrast)
    gray = float(torch.from_numpy(_GRAY) @ pixels.mean(dim=1)) * brightness * (1 - contrast)
    return torch.addmm(
        torch.full((3, 1), gray), torch.from_numpy(matrix.astype(np.float32)), pixels
    )


def _vary_stains(pixels: Tensor, rng: np.random.Generator, strength: float) -> Tensor:
    """Scale and shift the stains in (3, P) uint8 pixels; returns float32 in [0, 255].

    HED jitter of Tellez et al. 2018 (doi 10.1109/TMI.2018.2820199): haematoxylin, eosin and the
    residual are separated by colour deconvolution (Ruifrok and Johnston 2001), each multiplied by
    1 +- strength and shifted by +- strength, here in units of optical density (our choice).
    """
    factors = 1 + rng.uniform(-strength, strength, 3)
    shift = rng.uniform(-strength, strength, 3) @ _STAINS
    # Rows are pixels in the papers: density @ inverse @ factors @ stains.
    matrix = (_STAINS_OF_RGB @ np.diag(factors) @ _STAINS).T.astype(np.float32)
    density = _OPTICAL_DENSITY[pixels.int()]
    changed = torch.addmm(
        torch.from_numpy(shift.astype(np.float32))[:, None], torch.from_numpy(matrix), density
    )
    return changed.neg_().exp_().mul_(256).sub_(1)
