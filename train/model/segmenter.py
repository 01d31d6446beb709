"""The whole model, image to masks: normalise, encode twice, fuse, decode.

SAM-Path's late fusion (arXiv 2307.09570) with Dynamic Focal Attention (arXiv 2604.13479).
"""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import NamedTuple, Self, cast

import torch
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_shuffle

from train.model.class_bias import ClassTerms, find_strategy
from train.model.image_encoder import (
    IMAGE_ENCODERS,
    PATCH_SIZE,
    SKIP_STRIDES,
    build_image_encoder,
)
from train.model.mask_decoder import FocalBlock, MaskDecoder, NoPrompt
from train.model.pathology_encoder import PathologyEncoder
from train.settings import ModelSettings


class SegmenterOutput(NamedTuple):
    """Masks of a batch, the unlabelled channel first.

    low_res_logits: (B, 1 + C, H/4, W/4) float32; a U-Net's are (B, 1 + C, H, W).
    iou_scores: (B, 1 + C) float32, the predicted IoU of each mask.
    """

    low_res_logits: Tensor
    iou_scores: Tensor


class Segmenter(nn.Module):
    """SAM-Path: two encoders side by side, a fusion neck and SAM's mask decoder."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, settings: ModelSettings, num_classes: int) -> None:
        """Build the model with random weights and a bias of zero."""
        super().__init__()
        self.tile_size_px = settings.tile_size_px
        self.input_px = settings.input_px
        self.encoders_frozen = settings.encoders_frozen
        self.num_classes = num_classes

        kind = IMAGE_ENCODERS[settings.image_encoder]
        self.image_encoder = build_image_encoder(settings.image_encoder, settings.tile_size_px)
        self.pathology_encoder = PathologyEncoder(settings)
        num_fused = kind.embed_dim + self.pathology_encoder.embed_dim
        self.skip_dims = kind.skip_dims
        # Of the features: image tokens, skip connections, pathology tokens.
        self.feature_dims = [
            kind.embed_dim,
            *(
                dim * (PATCH_SIZE // stride) ** 2
                for dim, stride in zip(kind.skip_dims, SKIP_STRIDES, strict=False)
            ),
            self.pathology_encoder.embed_dim,
        ]
        self.num_features = sum(self.feature_dims)
        dim = settings.decoder_dim
        self.neck = nn.Sequential(
            nn.Conv2d(num_fused, dim, 1, bias=False),
            LayerNorm2d(dim),
            nn.Conv2d(dim, dim, 3, padding=1, bias=False),
            LayerNorm2d(dim),
        )
        self.prompt_encoder = NoPrompt(dim)
        self.mask_decoder = MaskDecoder(dim=dim, num_classes=num_classes, skip_dims=kind.skip_dims)
        strategy = find_strategy(settings.bias)
        self.class_attention_bias = strategy.module(num_classes).requires_grad_(strategy.learned)
        self.normalise_as_sam()
        if self.encoders_frozen:
            self.image_encoder.requires_grad_(False)
            self.pathology_encoder.requires_grad_(False)
        self.train()

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """What every step computes."""
        return self.image_encoder, self.pathology_encoder, self.neck, self.mask_decoder

    @property
    def image_to_token_attentions(self) -> tuple[nn.Module, ...]:
        """The attentions that hold the class bias, by block."""
        layers = cast(Iterable[FocalBlock], self.mask_decoder.transformer.layers)
        return tuple(layer.cross_attn_image_to_token for layer in layers)

    def normalise_as_sam(self) -> None:
        """Keep ImageNet's mean and standard deviation in [0, 255], (3, 1, 1)."""
        mean, deviation = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
        for name, values in (("pixel_mean", mean), ("pixel_std", deviation)):
            self.register_buffer(name, torch.tensor(values).reshape(3, 1, 1), persistent=False)

    def freeze_iou_head(self) -> None:
        """Leave out the IoU head where no loss trains it, which several devices refuse."""
        self.mask_decoder.iou_prediction_head.requires_grad_(False)

    def forward(self, images: Tensor) -> SegmenterOutput:
        """Segment (B, 3, H, W) float32, RGB in [0, 255], H = W = `ModelSettings.input_px`."""
        return self.decode(self.encode(images))

    def encode(self, images: Tensor) -> Tensor:
        """Both encoders' features side by side, (B, `num_features`, H/16, W/16)."""
        if self.input_px != self.tile_size_px:
            images = interpolate(images, (self.tile_size_px, self.tile_size_px), mode="bilinear")
        with torch.no_grad() if self.encoders_frozen else nullcontext():
            image_features = self.image_encoder((images - self.pixel_mean) / self.pixel_std)
            return torch.cat([image_features, self.pathology_encoder(images)], dim=1)

    def decode(self, features: Tensor, terms: ClassTerms | None = None) -> SegmenterOutput:
        """Masks from the encoders' features; `terms` replaces the model's own class terms."""
        if terms is None:
            terms = self.class_attention_bias()
        image, *packed, pathology = torch.split(features, self.feature_dims, dim=1)
        fused = torch.cat([image, pathology], dim=1) if packed else features
        skips = [
            pixel_shuffle(maps, PATCH_SIZE // stride)
            for maps, stride in zip(packed, SKIP_STRIDES, strict=False)
        ]
        image_embeddings, image_pe = self.prompt_encoder(self.neck(fused))
        return SegmenterOutput(*self.mask_decoder(image_embeddings, image_pe, terms, skips))

    def train(self, mode: bool = True) -> Self:
        """Set training mode; frozen encoders stay in evaluation mode."""
        super().train(mode)
        if self.encoders_frozen:
            self.image_encoder.eval()
            self.pathology_encoder.eval()
        return self


def encode_for_training(segmenter: Segmenter, images: Tensor, *, mixed_precision: bool) -> Tensor:
    """Features as training, validation and the embedding cache compute them.

    Args:
        segmenter: the model.
        images: (B, 3, H, W) uint8, RGB in [0, 255], on its device.
        mixed_precision: whether the run is one.

    Returns:
        (B, D_image + D_pathology, H/16, W/16) float32.
    """
    if not segmenter.encoders_frozen:
        return segmenter.encode(images.float()).float()
    bfloat16 = encodes_in_bfloat16(images.device, mixed_precision=mixed_precision)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
        return segmenter.encode(images.float()).float()


def encodes_in_bfloat16(device: torch.device, *, mixed_precision: bool) -> bool:
    """Whether frozen encoders, which learn nothing, run in bfloat16.

    On a GPU that knows it they always do; on a CPU, where few are faster at it, in a run of mixed
    precision.
    """
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return fast or mixed_precision


def labels_from_logits(low_res_logits: Tensor, size_px: int) -> Tensor:
    """Labels (B, H, W) int64 in 1..C from (B, 1 + C, h, w): unlabelled is never predicted."""
    return upsample(low_res_logits[:, 1:], size_px).argmax(dim=1) + 1


def upsample(low_res: Tensor, size_px: int) -> Tensor:
    """Resize (B, K, h, w) bilinearly to (B, K, size_px, size_px), pixel centres at halves."""
    return nn.functional.interpolate(
        low_res, size=(size_px, size_px), mode="bilinear", align_corners=False
    )
