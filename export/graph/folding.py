"""What folding needs: modules with projections, and pixels as patches."""

import copy

from torch import Tensor, nn

from export.graph.attention import Projection
from train.model.image_encoder import PATCH_SIZE


def copied(module: nn.Module) -> nn.Module:
    """Copy a module; the copy shares its tensors."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def with_projections(module: nn.Module) -> nn.Module:
    """Copy a module with its linear layers as MatMul and Add; the copy shares its tensors."""
    module = copied(module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Projection.of(child))
    return module


def patches_of(image: Tensor, grid: int) -> Tensor:
    """Cut (B, H, W, 3) into (B, N, 16*16*3), row by row."""
    pixels = image.reshape(-1, grid, PATCH_SIZE, grid, PATCH_SIZE, 3)
    return pixels.permute(0, 1, 3, 2, 4, 5).reshape(-1, grid**2, PATCH_SIZE**2 * 3)


def images_of(patches: Tensor, grid: int) -> Tensor:
    """Put (B, N, 16*16*3) patches together again, as (B, 3, H, W)."""
    size = grid * PATCH_SIZE
    pixels = patches.reshape(-1, grid, grid, PATCH_SIZE, PATCH_SIZE, 3)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, size, size)


def fold_patch_embedding(
    kernel: Tensor, conv_bias: Tensor | None, mean: Tensor, std: Tensor, positions: Tensor | None
) -> Projection:
    """Fold normalisation, patch convolution and position embedding into one projection of pixels.

    This is exact, because the convolution has no padding. `kernel` is (D, 3, 16, 16), and
    `positions` is (1, N, D).
    """
    weight = kernel / std
    bias = -(weight * mean).sum(dim=(1, 2, 3))
    if conv_bias is not None:
        bias = bias + conv_bias
    if positions is not None:
        bias = bias + positions
    return Projection(weight.permute(2, 3, 1, 0).flatten(0, 2), bias)
