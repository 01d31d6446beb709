"""The baseline of the benchmarks: SAM-Path as its paper describes it.

Written from the description in arXiv 2307.09570 with segment_anything's own decoder. It runs as the
method is run outside this project: normalise, both encoders, the fusion neck, SAM's decoder one
image after another, upsampling of all masks, and argmax. PyTorch eager, with default settings.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, TwoWayTransformer
from torch import Tensor, nn

from train.model.segmenter import Segmenter, SegmenterOutput


class DirectDecoder(nn.Module):
    """The neck and SAM's own decoder, one image after another, with a segmenter's weights."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        dim: int = segmenter.mask_decoder.transformer_dim
        self.neck = segmenter.neck
        self.prompt_encoder = segmenter.prompt_encoder
        self.sam_decoder: Any = MaskDecoder(
            transformer_dim=dim,
            transformer=TwoWayTransformer(depth=2, embedding_dim=dim, mlp_dim=8 * dim, num_heads=8),
            num_multimask_outputs=1 + segmenter.num_classes,
        )
        # Shares the parameters, so a training step of either one changes both.
        ours = dict(segmenter.mask_decoder.named_parameters())
        for name, _ in list(self.sam_decoder.named_parameters()):
            module, _, attribute = name.rpartition(".")
            setattr(self.sam_decoder.get_submodule(module), attribute, ours[name])

    def forward(self, features: Tensor) -> SegmenterOutput:
        """Decode features (B, D_image + D_pathology, h, w) float; masks have unlabelled first."""
        masks, scores = [], []
        for embedding in self.neck(features):
            size = embedding.shape[-2:]
            no_mask = self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
            mask, iou = self.sam_decoder(
                image_embeddings=embedding[None],
                image_pe=self.prompt_encoder.pe_layer(size)[None],
                sparse_prompt_embeddings=embedding.new_zeros(1, 0, embedding.shape[0]),
                dense_prompt_embeddings=no_mask.expand(-1, -1, *size),
                multimask_output=True,
            )
            masks.append(mask)
            scores.append(iou)
        return SegmenterOutput(torch.cat(masks), torch.cat(scores))


class DirectSamPath(nn.Module):
    """SAM-Path with a segmenter's weights. It has no bias, so the segmenter's must be zero."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        assert not segmenter.class_attention_bias.delta.any(), "SAM-Path has no bias"
        self.segmenter = segmenter
        self.decoder = DirectDecoder(segmenter)
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        """Label RGB images (B, H, W, 3) uint8; returns labels (B, H, W) int64 in 1..C."""
        return self.labels(self.low_res_logits(image), image.shape[1:3])

    def low_res_logits(self, image: Tensor) -> Tensor:
        """Logits (B, C, H/4, W/4) of the classes, from RGB images (B, H, W, 3) uint8."""
        images = image.permute(0, 3, 1, 2).float()
        output: SegmenterOutput = self.decoder(self.segmenter.encode(images))
        return output.low_res_logits[:, 1:]

    def labels(self, low_res_logits: Tensor, size: Sequence[int]) -> Tensor:
        """Labels (B, H, W) int64 in 1..C of an image of `size`."""
        logits = F.interpolate(low_res_logits, tuple(size), mode="bilinear", align_corners=False)
        return logits.argmax(dim=1) + 1
