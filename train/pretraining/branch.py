"""The networks of student and teacher: an encoder with DINO's heads.

Letters: B images, N patches, D width, K prototypes.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.pretraining.encoder import create_encoder
from train.pretraining.settings import PretrainSettings

Encoded = tuple[Tensor, Tensor]
"""Class tokens (B, D) and patch tokens (B, N, D) of one view of B samples."""


class Head(nn.Module):
    """DINO's head (arXiv 2104.14294): three linear layers, a unit vector, K unit prototypes."""

    def __init__(self, width: int, hidden: int, bottleneck: int, num_prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            *(nn.Linear(width, hidden), nn.GELU()),
            *(nn.Linear(hidden, hidden), nn.GELU()),
            nn.Linear(hidden, bottleneck),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.randn(num_prototypes, bottleneck))

    def forward(self, tokens: Tensor) -> Tensor:
        """Turn (..., D) tokens into (..., K) logits in [-1, 1]."""
        unit = F.normalize(self.mlp(tokens), dim=-1, eps=1e-6)
        return F.linear(unit, F.normalize(self.prototypes, dim=-1).to(unit.dtype))


class Branch(nn.Module):
    """An encoder with its heads: the student, or the teacher."""

    def __init__(self, settings: PretrainSettings, *, drop_path: float) -> None:
        super().__init__()
        self.encoder = create_encoder(settings, drop_path=drop_path)
        width = int(cast(Any, self.encoder).num_features)
        distillation = settings.distillation
        size = (
            distillation.head_hidden,
            distillation.head_bottleneck,
            distillation.prototypes,
        )
        self.cls_head = Head(width, *size)
        self.dense_head = Head(width, *size)
        self.mask_token = nn.Parameter(torch.zeros(width))

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Encoded:
        """Encode normalised (B, 3, H, W) images, patches under `mask` (B, N) hidden.

        Returns:
            Class tokens (B, D) and patch tokens (B, N, D), after the final norm.
        """
        vit = cast(Any, self.encoder)
        if mask is None:
            tokens = vit.forward_features(images)
        else:
            patches = vit.patch_embed(images)
            hidden = mask.reshape(*patches.shape[:-1], 1)
            patches = torch.where(hidden, self.mask_token.to(patches.dtype), patches)
            tokens = vit.norm(vit.blocks(vit.norm_pre(vit._pos_embed(patches))))
        return tokens[:, 0], tokens[:, vit.num_prefix_tokens :]


def encode_views(branch: Branch, views: Tensor, mask: Tensor | None = None) -> list[Encoded]:
    """Encode several views of B samples in one batch: small encoders wait for launches on a GPU.

    Args:
        branch: student or teacher.
        views: (V, B, 3, H, W) normalised.
        mask: (V * B, N) bool, patches to hide.

    Returns:
        One entry per view.
    """
    if not len(views):
        return []
    classes, patches = branch(views.flatten(0, 1), mask)
    return list(zip(classes.chunk(len(views)), patches.chunk(len(views)), strict=True))
