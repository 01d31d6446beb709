"""The pathology encoder: any timm vision transformer, run densely on the whole tile."""

from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from train.errors import FocalPathError
from train.model.image_encoder import PATCH_SIZE
from train.settings import ModelSettings

_LAYER_SCALE = 1e-5
"""Where LayerScale starts, as in DINOv2 and UNI."""


class PathologyEncoder(nn.Module):
    """A timm ViT whose patch tokens are laid out as an image; class and register tokens drop out.

    SAM-Path (arXiv 2307.09570) takes HIPT's ViT-S/16, a DINO ViT-S.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: ModelSettings) -> None:
        super().__init__()
        self.vit = _create(model)
        self.embed_dim: int = self.vit.num_features
        given = {"mean": model.pathology_mean, "std": model.pathology_std}
        for buffer, values in given.items():
            values = values or self.vit.pretrained_cfg[buffer]
            scaled = 255 * torch.tensor(values, dtype=torch.float32).reshape(3, 1, 1)
            self.register_buffer(buffer, scaled, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Encode (B, 3, H, W) float32, RGB in [0, 255], to (B, D, H/16, W/16)."""
        batch, _, height, width = images.shape
        tokens: Tensor = self.vit.forward_features((images - self.mean) / self.std)
        patches = tokens[:, self.vit.num_prefix_tokens :]  # B x (H/16 * W/16) x D
        grid = (height // PATCH_SIZE, width // PATCH_SIZE)
        return patches.transpose(1, 2).reshape(batch, self.embed_dim, *grid)


def _create(model: ModelSettings) -> Any:
    """Create timm's model, and refuse one whose tokens are no grid of 16 pixels.

    Raises:
        FocalPathError: timm does not know it, or it is no such vision transformer.
    """
    name = model.pathology_encoder
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*patch16*")[:5])
        raise FocalPathError(
            f"timm has no model {name!r}; expected a vision transformer with patches of 16 "
            f"pixels, such as {close or 'vit_small_patch16_224'}"
        )
    overrides: dict[str, Any] = {}
    if model.pathology_encoder_depth is not None:
        overrides["depth"] = model.pathology_encoder_depth
    if model.pathology_layer_scale:
        overrides["init_values"] = _LAYER_SCALE
    try:
        vit = cast(
            Any, timm.create_model(name, img_size=model.tile_size_px, num_classes=0, **overrides)
        )
        patch_size = tuple(vit.patch_embed.patch_size)
        _ = vit.num_prefix_tokens  # where there is none, there are no tokens
    except (TypeError, AttributeError, ValueError, AssertionError) as error:
        raise FocalPathError(
            f"{name} is no plain vision transformer of timm's, or not with these settings "
            f"({error}); expected one that turns patches of {PATCH_SIZE} pixels into tokens, such "
            "as vit_small_patch16_224"
        ) from error
    if patch_size != (PATCH_SIZE, PATCH_SIZE):
        raise FocalPathError(
            f"{name} cuts patches of {patch_size} pixels, SAM of {PATCH_SIZE}: their features "
            f"cannot be joined. Take a model with patch{PATCH_SIZE} in its name."
        )
    return vit
