"""The baseline of `make benchmark-export`: SAM-Path as its paper describes it, run as it comes.

Written from the description in arXiv 2307.09570 with segment_anything's own modules, the way the
method is run outside this project: normalise, both encoders, the fusion neck, then SAM's decoder
one image after another, upsampling of all masks and an argmax. PyTorch eager, default settings.
"""

from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor, nn

from train.model.image_encoder import PATCH_SIZE
from train.model.segmenter import Segmenter


class DirectSamPath(nn.Module):
    """SAM-Path with a segmenter's weights; it has no bias, so the segmenter's must be zero."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        assert not segmenter.class_attention_bias.delta.any(), "SAM-Path has no bias"
        dim: int = segmenter.mask_decoder.transformer_dim
        grid = segmenter.tile_size_px // PATCH_SIZE
        self.segmenter = segmenter
        self.prompt_encoder: Any = PromptEncoder(
            embed_dim=dim,
            image_embedding_size=(grid, grid),
            input_image_size=(segmenter.tile_size_px, segmenter.tile_size_px),
            mask_in_chans=16,
        )
        self.mask_decoder: Any = MaskDecoder(
            transformer_dim=dim,
            transformer=TwoWayTransformer(depth=2, embedding_dim=dim, mlp_dim=8 * dim, num_heads=8),
            num_multimask_outputs=1 + segmenter.num_classes,
        )
        self.prompt_encoder.load_state_dict(segmenter.prompt_encoder.state_dict(), strict=False)
        self.mask_decoder.load_state_dict(segmenter.mask_decoder.state_dict())
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        """Label (B, H, W, 3) uint8; returns (B, H, W) int64 in 1..C."""
        images = image.permute(0, 3, 1, 2).float()
        model = self.segmenter
        features = torch.cat(
            [
                model.image_encoder((images - model.pixel_mean) / model.pixel_std),
                model.pathology_encoder(images),
            ],
            dim=1,
        )
        embeddings = model.neck(features)
        masks = [self._decode(embedding[None]) for embedding in embeddings]
        size = image.shape[1:3]
        logits = F.interpolate(torch.cat(masks), size, mode="bilinear", align_corners=False)
        return logits[:, 1:].argmax(dim=1) + 1

    def _decode(self, embedding: Tensor) -> Tensor:
        """SAM's decoder without prompts: (1, D, h, w) to (1, 1 + C, 4h, 4w), unlabelled first."""
        sparse, dense = self.prompt_encoder(points=None, boxes=None, masks=None)
        masks, _ = self.mask_decoder(
            image_embeddings=embedding,
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        return masks  # type: ignore[no-any-return]
