"""The pathology encoder's exported form: constants folded where it is timm's plain one."""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from export.graph.attention import AttentionForm, PathologyAttention, Projection
from export.graph.folding import copied, fold_patch_embedding, images_of, with_projections
from train.model.image_encoder import PATCH_SIZE
from train.model.pathology_encoder import PathologyEncoder
from train.model.segmenter import Segmenter


class FoldedPathologyEncoder(nn.Module):
    """timm's plain vision transformer, from patches (B, N, 768) to (B, N, D)."""

    positions: Tensor

    def __init__(self, segmenter: Segmenter, form: AttentionForm) -> None:
        super().__init__()
        encoder = segmenter.pathology_encoder
        vit = encoder.vit
        self.num_prefix_tokens: int = vit.num_prefix_tokens
        prefix = torch.cat(
            [token[0] for token in (vit.cls_token, vit.reg_token) if token is not None]
            or [torch.zeros(0, vit.embed_dim)]
        )
        positions = vit.pos_embed
        if not vit.no_embed_class:
            prefix = prefix + positions[0, : self.num_prefix_tokens]
            positions = positions[:, self.num_prefix_tokens :]
        patch_embed = fold_patch_embedding(
            encoder.patch_kernel(), vit.patch_embed.proj.bias, encoder.mean, encoder.std, positions
        )
        self.patch_embed = Projection(patch_embed.weight, None)
        # Added after padding makes room for the prefix, so the prefix is not copied per image.
        positions = torch.cat([prefix[None], cast(Tensor, patch_embed.bias)], dim=1)
        self.register_buffer("positions", positions)
        self.norm_pre, self.norm = vit.norm_pre, vit.norm
        self.blocks = nn.ModuleList()
        for block in vit.blocks:
            attention = PathologyAttention(block.attn, form)
            block = with_projections(block)
            block.attn = attention
            self.blocks.append(block)

    @staticmethod
    def fits(encoder: PathologyEncoder) -> bool:
        """Whether timm's model is the plain vision transformer that this class covers."""
        vit = encoder.vit
        return (
            type(vit) is VisionTransformer
            and isinstance(vit.patch_embed.norm, nn.Identity)
            and vit.pos_embed is not None
            and not vit.dynamic_img_size
            and all(_is_plain(block) for block in cast(Any, vit.blocks))
        )

    def forward(self, patches: Tensor) -> Tensor:
        """Encode (B, N, 768) float32 pixels in [0, 255]."""
        tokens = F.pad(self.patch_embed(patches), (0, 0, self.num_prefix_tokens, 0))
        tokens = self.norm_pre(tokens + self.positions)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens[:, self.num_prefix_tokens :])  # type: ignore[no-any-return]


class UnfoldedPathologyEncoder(nn.Module):
    """Any other timm encoder, unchanged, on the same patches.

    Its attention is written out. Torch's fused attention has no ONNX form with a position bias, and
    hides the logits from the audit.
    """

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.encoder = copied(segmenter.pathology_encoder)
        for module in cast(Iterable[Any], self.encoder.modules()):
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        self.grid = segmenter.tile_size_px // PATCH_SIZE

    def forward(self, patches: Tensor) -> Tensor:
        """Encode (B, N, 768) float32 pixels in [0, 255]."""
        features: Tensor = self.encoder(images_of(patches, self.grid))
        return features.flatten(2).transpose(1, 2)


def _is_plain(block: nn.Module) -> bool:
    """Whether a block is attention, then an MLP, each behind its norm."""
    return type(block) is Block and PathologyAttention.fits(block.attn)
