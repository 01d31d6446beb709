"""SAM-Path as its paper describes it, with its own names of weights, to hold an import against.

Written from arXiv 2307.09570 with segment_anything's modules, and independent of `train`: the HIPT
encoder resizes its position embeddings in every forward pass as DINO's code does, the decoder takes
one image after another, and a larger image is normalised first and then resized as float without
antialiasing.
"""

from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

PATCH = 16
SAM_MEAN, SAM_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DIM, SAM_DIM, HIPT_DIM = 32, 128, 192


def sam_of(tile_size_px: int, num_masks: int = 4) -> Sam:
    """segment_anything's own model, as small as the toy settings."""
    side = tile_size_px // PATCH
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=tile_size_px,
            embed_dim=SAM_DIM,
            depth=4,
            num_heads=4,
            out_chans=DIM,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=8,
            global_attn_indexes=(1, 3),
        ),
        prompt_encoder=PromptEncoder(DIM, (side, side), (tile_size_px, tile_size_px), 16),
        mask_decoder=MaskDecoder(
            transformer_dim=DIM,
            transformer=TwoWayTransformer(2, DIM, num_heads=8, mlp_dim=8 * DIM),
            num_multimask_outputs=num_masks - 1,
            iou_head_hidden_dim=256,
        ),
    )


class SamPath(nn.Module):
    """Two frozen encoders, a fusion neck and SAM's decoder with 2 + C mask tokens."""

    def __init__(self, num_classes: int, tile_size_px: int = 64, hipt_size_px: int = 48) -> None:
        super().__init__()
        self.tile_size_px = tile_size_px
        self.model = sam_of(tile_size_px, 2 + num_classes)
        self.fusion_neck = nn.Sequential(
            nn.Conv2d(SAM_DIM + HIPT_DIM, DIM, 1, bias=False),
            LayerNorm2d(DIM),
            nn.Conv2d(DIM, DIM, 3, padding=1, bias=False),
            LayerNorm2d(DIM),
        )
        self.extra_encoder = nn.Module()
        self.extra_encoder.model = timm.create_model(
            "vit_tiny_patch16_224", img_size=hipt_size_px, depth=1, num_classes=0
        )

    @torch.no_grad()
    def label(self, image: Tensor) -> Tensor:
        """Label an (H, W, 3) uint8 image; returns (H, W) int64 in 1..C."""
        size = image.shape[:2]
        pixels = image.permute(2, 0, 1)[None].float() / 255
        features = [
            self._sam_features(self._resized(_normalised(pixels, SAM_MEAN, SAM_STD))),
            self._hipt_features(self._resized(_normalised(pixels, (0.5,) * 3, (0.5,) * 3))),
        ]
        embedding = self.fusion_neck(torch.cat(features, dim=1))
        sparse, dense = self.model.prompt_encoder(points=None, boxes=None, masks=None)
        masks, _ = self.model.mask_decoder(
            image_embeddings=embedding,
            image_pe=self.model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        masks = F.interpolate(masks, size, mode="bilinear", align_corners=False)
        return masks[0, 1:].argmax(dim=0) + 1

    def _resized(self, pixels: Tensor) -> Tensor:
        side = self.tile_size_px
        if pixels.shape[-2:] == (side, side):
            return pixels
        return F.interpolate(pixels, (side, side), mode="bilinear", align_corners=False)

    def _sam_features(self, pixels: Tensor) -> Tensor:
        encoder: Any = self.model.image_encoder
        tokens = encoder.patch_embed(pixels) + encoder.pos_embed
        for block in encoder.blocks:
            tokens = block(tokens)
        return tokens.permute(0, 3, 1, 2)

    def _hipt_features(self, pixels: Tensor) -> Tensor:
        vit: Any = self.extra_encoder.model
        tokens = vit.patch_embed.proj(pixels)
        grid = tokens.shape[-1]
        class_position, patches = vit.pos_embed[:, :1], vit.pos_embed[:, 1:]
        side = int(patches.shape[1] ** 0.5)
        patches = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, scale_factor=(grid + 0.1) / side, mode="bicubic")
        tokens = torch.cat(
            [
                vit.cls_token + class_position,
                tokens.flatten(2).transpose(1, 2) + patches.flatten(2).transpose(1, 2),
            ],
            dim=1,
        )
        for block in vit.blocks:
            tokens = block(tokens)
        return vit.norm(tokens)[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))

    def checkpoint(self) -> dict[str, Any]:
        """What its Lightning file holds."""
        return {
            "state_dict": {f"model.{name}": value for name, value in self.state_dict().items()},
            "epoch": 31,
        }


def random_sam_path(num_classes: int, seed: int = 0) -> SamPath:
    """A SAM-Path whose weights are random, position embeddings and norms too."""
    torch.manual_seed(seed)
    model = SamPath(num_classes).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "pos" in name or "token" in name:
            nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
    return model


def _normalised(pixels: Tensor, mean: Any, std: Any) -> Tensor:
    return (pixels - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)
