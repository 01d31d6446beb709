"""The exported form of the model: everything that does not depend on the image is a constant.

The layout is token-major, (B, tokens, channels). All layers except one 3 x 3 convolution are
MatMuls, and all norms are ONNX's LayerNormalization. Blocks keep their names from the segmenter.

Shape letters: B images, N = h*w image tokens, D channels, C classes, T = 3 + C tokens.
"""

from typing import Any, cast

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn
from torch.nn.functional import interpolate

from export.graph.attention import AttentionForm, GlobalAttention, Projection, WindowAttention
from export.graph.decoder import FoldedDecoder, TokenNorm
from export.graph.folding import fold_patch_embedding, images_of, patches_of, with_projections
from export.graph.pathology_encoder import FoldedPathologyEncoder, UnfoldedPathologyEncoder
from export.graph.reference import Deployable, DeployableOutput, outputs
from train.model.image_encoder import PATCH_SIZE, SKIP_STRIDES, ConvolutionalStem, stage_of
from train.model.segmenter import Segmenter


class FoldedSegmenter(nn.Module):
    """The whole model, from (B, H, W, 3) uint8 to `DeployableOutput`."""

    @torch.no_grad()
    def __init__(self, deployable: Deployable, form: AttentionForm) -> None:
        super().__init__()
        segmenter = deployable.segmenter
        self.tile_size_px = segmenter.tile_size_px
        self.input_px = segmenter.input_px
        self.image_encoder = FoldedImageEncoder(segmenter, form)
        self.pathology_encoder = (
            FoldedPathologyEncoder(segmenter, form)
            if FoldedPathologyEncoder.fits(segmenter.pathology_encoder)
            else UnfoldedPathologyEncoder(segmenter)
        )
        self.neck = FoldedNeck(segmenter)
        terms = deployable.terms
        self.mask_decoder = FoldedDecoder(segmenter, terms)
        # In the layout of a mask of ONNX's Attention: (batch, heads, queries, keys).
        token_bias = terms.attention_bias.detach()[..., self.mask_decoder.token_order]
        if token_bias.dim() == 1:
            self.register_buffer("class_attention_bias", token_bias.reshape(1, 1, 1, -1))
            self._biases = ["class_attention_bias"] * len(self.mask_decoder.layers)
        else:
            self._biases = [f"class_attention_bias_{index}" for index in range(len(token_bias))]
            for name, of_block in zip(self._biases, token_bias, strict=True):
                self.register_buffer(name, of_block[None, :, None].clone())  # 1 x H x 1 x T

    def forward(self, image: Tensor) -> DeployableOutput:
        """Segment (B, H, W, 3) uint8, RGB in [0, 255], H = W = `ModelSettings.input_px`."""
        # The cast comes first: TensorRT takes uint8 only at the graph's edge.
        pixels = image.float()
        if self.input_px != self.tile_size_px:
            factor = self.tile_size_px / self.input_px
            planes = interpolate(pixels.permute(0, 3, 1, 2), scale_factor=factor, mode="bilinear")
            pixels = planes.permute(0, 2, 3, 1)
        patches = patches_of(pixels, self.tile_size_px // PATCH_SIZE)
        image_tokens, *skips = self.image_encoder(patches)
        keys = self.neck(image_tokens, self.pathology_encoder(patches))
        low_res_logits, iou_scores = self.mask_decoder(
            keys, [self.get_buffer(name) for name in self._biases], skips
        )
        return outputs(low_res_logits, iou_scores, self.input_px)


class FoldedImageEncoder(nn.Module):
    """SAM's image encoder without its neck, from patches (B, N, 768) to (B, N, D).

    One with skip connections gives their maps, too.
    """

    patch_embed: nn.Module

    def __init__(self, segmenter: Segmenter, form: AttentionForm) -> None:
        super().__init__()
        encoder = cast(ImageEncoderViT, segmenter.image_encoder)
        grid = segmenter.tile_size_px // PATCH_SIZE
        positions = None if encoder.pos_embed is None else encoder.pos_embed.flatten(1, 2)
        conv = encoder.patch_embed.proj
        self.patch_embed = (
            StemEmbedding(segmenter, encoder.patch_embed, positions)
            if isinstance(encoder.patch_embed, ConvolutionalStem)
            else fold_patch_embedding(
                conv.weight, conv.bias, segmenter.pixel_mean, segmenter.pixel_std, positions
            )
        )
        self.blocks = nn.ModuleList(ImageBlock(block, grid, form) for block in encoder.blocks)

    def forward(self, patches: Tensor) -> tuple[Tensor, ...]:
        """Encode (B, N, 768) float32 pixels in [0, 255].

        Returns:
            The tokens (B, N, D), and a map of each skip connection as the decoder takes them.
        """
        embedded = self.patch_embed(patches)
        tokens, *skips = embedded if isinstance(embedded, tuple) else (embedded,)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens, *skips


class StemEmbedding(nn.Module):
    """A convolutional stem and the position embedding, from patches (B, N, 768) to (B, N, D).

    Behind the tokens it gives the maps of the skip connections, if the decoder takes any.

    The image's mean cannot be folded: the convolutions pad the normalised image with zeros.
    """

    mean: Tensor
    std: Tensor
    positions: Tensor | None

    def __init__(
        self, segmenter: Segmenter, stem: ConvolutionalStem, positions: Tensor | None
    ) -> None:
        super().__init__()
        self.grid = segmenter.tile_size_px // PATCH_SIZE
        self.stem = stem
        self.register_buffer("mean", segmenter.pixel_mean)
        self.register_buffer("std", segmenter.pixel_std)
        self.register_buffer("positions", positions)
        self.skip_stages = [stage_of(stride) for stride in SKIP_STRIDES if segmenter.skip_dims]

    def forward(self, patches: Tensor) -> tuple[Tensor, ...]:
        """Embed (B, N, 768) float32 pixels in [0, 255]."""
        images = (images_of(patches, self.grid) - self.mean) / self.std
        maps = self.stem.maps(images)
        tokens = self.stem.embed(maps[-1]).flatten(1, 2)
        if self.positions is not None:
            tokens = tokens + self.positions
        return tokens, *(maps[stage] for stage in self.skip_stages)


class ImageBlock(nn.Module):
    """A block of SAM's image encoder on (B, N, D)."""

    def __init__(self, block: Any, grid: int, form: AttentionForm) -> None:
        super().__init__()
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.attn = (
            WindowAttention(block.attn, grid, block.window_size, form)
            if block.window_size > 0
            else GlobalAttention(block.attn, grid, form)
        )
        self.mlp = with_projections(block.mlp)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform (B, N, D)."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))  # type: ignore[no-any-return]


class FoldedNeck(nn.Module):
    """The fusion neck, with SAM's "no mask" embedding in the bias of its last norm."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.grid = segmenter.tile_size_px // PATCH_SIZE
        mix, norm1, self.conv, norm2 = cast(Any, segmenter.neck)
        weight = mix.weight.flatten(1).T  # (D_image + D_pathology) x D
        num_pathology = segmenter.pathology_encoder.embed_dim
        self.mix_image = Projection(weight[:-num_pathology], None)
        self.mix_pathology = Projection(weight[-num_pathology:], None)
        self.norm1 = TokenNorm(norm1)
        self.norm2 = TokenNorm(norm2, segmenter.prompt_encoder.no_mask_embed.weight[0])

    def forward(self, image_tokens: Tensor, pathology_tokens: Tensor) -> Tensor:
        """Fuse (B, N, D_image) and (B, N, D_pathology) to the decoder's (B, N, D)."""
        tokens = self.mix_image(image_tokens) + self.mix_pathology(pathology_tokens)
        tokens = self.norm1(tokens).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return self.norm2(self.conv(tokens).flatten(2).transpose(1, 2))  # type: ignore[no-any-return]
