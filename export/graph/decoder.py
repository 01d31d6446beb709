"""SAM's mask decoder, with everything that does not depend on the image folded into constants.

Without prompts, the tokens are constant until they first attend to the image. This module computes
once: the first block's self-attention and norm, and the projections of tokens and positional
encodings. It skips the unused outputs of the single-mask and the unlabelled token.

Shape letters: B images, N = h*w image tokens, D channels, C classes, T = 3 + C tokens.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.graph.attention import PLAIN, Projection, attend, join_heads, split_heads
from train.model.class_bias import NUM_LEADING_TOKENS, ClassTerms
from train.model.image_encoder import PATCH_SIZE
from train.model.mask_decoder import FocalBlock, FocalTransformer, MaskDecoder, SkipConnection
from train.model.segmenter import Segmenter

_NUM_DEAD = NUM_LEADING_TOKENS - 1
"""The single-mask and the unlabelled token. Others attend to them; their outputs are unused."""


class FoldedDecoder(nn.Module):
    """Computes the classes' logits and scores from the image tokens (B, N, D)."""

    first_queries: Tensor
    mask_bias: Tensor | None

    def __init__(self, segmenter: Segmenter, terms: ClassTerms) -> None:
        super().__init__()
        decoder = segmenter.mask_decoder
        self.grid = segmenter.tile_size_px // PATCH_SIZE
        num_tokens = NUM_LEADING_TOKENS + segmenter.num_classes
        # Attention does not depend on the order. Unused tokens come first; the rest is one slice.
        self.token_order = [
            *range(1, NUM_LEADING_TOKENS),
            0,
            *range(NUM_LEADING_TOKENS, num_tokens),
        ]
        tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = tokens[self.token_order][None]  # 1 x T x D
        image_pe = segmenter.prompt_encoder.pe_layer((self.grid, self.grid)).flatten(1).T[None]
        temperature = terms.temperature
        if temperature is not None:
            temperature = temperature.detach()[self.token_order].reshape(1, -1, 1)
        mask_bias = terms.mask_bias
        if mask_bias is not None:  # without the unlabelled channel
            mask_bias = mask_bias.detach()[1:].reshape(1, -1, 1, 1)
        self.register_buffer("mask_bias", mask_bias)
        transformer = cast(FocalTransformer, decoder.transformer)
        first, *others = cast(list[FocalBlock], transformer.layers)
        first_queries = first.norm1(first.attend_to_tokens(tokens, tokens))
        self.register_buffer("first_queries", first_queries)
        self.layers = nn.ModuleList(
            FoldedBlock(
                block, tokens, image_pe, first_queries if block is first else None, temperature
            )
            for block in (first, *others)
        )
        self.final_attn_token_to_image = FoldedAttention(
            transformer.final_attn_token_to_image,
            tokens[:, _NUM_DEAD:],
            image_pe,
            query_scale=None if temperature is None else temperature[:, _NUM_DEAD:],
        )
        self.norm_final_attn = transformer.norm_final_attn
        self.output_upscaling: nn.Module = (
            SkipUpscaling(decoder, self.grid)
            if len(decoder.skips)
            else FoldedUpscaling(decoder.output_upscaling, self.grid)
        )
        self.output_hypernetworks_mlps = TokenMlps(decoder.output_hypernetworks_mlps[_NUM_DEAD:])
        self.iou_prediction_head = TokenMlps([decoder.iou_prediction_head], _NUM_DEAD)

    def forward(
        self, keys: Tensor, token_biases: Sequence[Tensor], skips: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        """Decode (B, N, D) with each block's bias (1, 1 or H, 1, T), in `token_order`.

        `skips` are the image encoder's finer maps, (B, D_skip, 2h, 2w) and (B, D_skip, 4h, 4w).

        Returns:
            low_res_logits: (B, C, 4h, 4w).
            iou_scores: (B, C).
        """
        queries = self.first_queries
        for layer, token_bias in zip(self.layers, token_biases, strict=True):
            queries, keys = layer(queries, keys, token_bias)
        queries = queries[:, _NUM_DEAD:]  # the iou token and the classes'
        to_image = self.final_attn_token_to_image(queries, keys, keys)
        tokens_out = self.norm_final_attn(queries + to_image)
        class_weights = self.output_hypernetworks_mlps(tokens_out[:, 1:])  # B x C x D/8
        low_res_logits = self.output_upscaling(keys, class_weights, *skips)
        if self.mask_bias is not None:
            low_res_logits = low_res_logits + self.mask_bias
        return low_res_logits, self.iou_prediction_head(tokens_out[:, :1]).flatten(1)


class FoldedBlock(nn.Module):
    """The two-way block. In the first one, the tokens' self-attention is already computed."""

    def __init__(
        self,
        block: FocalBlock,
        tokens: Tensor,
        image_pe: Tensor,
        constant_queries: Tensor | None,
        temperature: Tensor | None,
    ) -> None:
        super().__init__()
        self.self_attn = (
            FoldedAttention(block.self_attn, tokens, tokens) if constant_queries is None else None
        )
        self.cross_attn_token_to_image = FoldedAttention(
            block.cross_attn_token_to_image, tokens, image_pe, constant_queries, temperature
        )
        self.cross_attn_image_to_token = FoldedAttention(
            block.cross_attn_image_to_token, image_pe, tokens
        )
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.norm3, self.norm4 = block.norm3, block.norm4
        self.mlp_in, self.mlp_out = Projection.of(block.mlp.lin1), Projection.of(block.mlp.lin2)

    def forward(self, queries: Tensor, keys: Tensor, token_bias: Tensor) -> tuple[Tensor, Tensor]:
        """Update tokens `queries` (B, T, D) and image `keys` (B, N, D)."""
        if self.self_attn is not None:
            queries = self.norm1(queries + self.self_attn(queries, queries, queries))
        to_image = self.cross_attn_token_to_image(queries, keys, keys)
        queries = self.norm2(queries + to_image)
        queries = self.norm3(queries + self.mlp_out(F.relu(self.mlp_in(queries))))
        to_token = self.cross_attn_image_to_token(keys, queries, queries, token_bias)
        return queries, self.norm4(keys + to_token)


class FoldedAttention(nn.Module):
    """SAM's attention, with projected positional encodings as biases of the projections.

    (x + pe) W = x W + constant. Scale and biases are folded as in `export.graph.attention`.
    """

    constant_queries: Tensor | None
    query_scale: Tensor | None

    def __init__(
        self,
        attention: Any,
        query_pe: Tensor,
        key_pe: Tensor,
        constant_queries: Tensor | None = None,
        query_scale: Tensor | None = None,
    ) -> None:
        """Fold the constants. `query_scale` (1, Q, 1), or None, multiplies each query's logits."""
        super().__init__()
        self.num_heads = attention.num_heads
        scale = (attention.internal_dim // attention.num_heads) ** -0.5
        weight = attention.q_proj.weight.T * scale
        bias = attention.q_proj.bias * scale + query_pe @ weight
        if constant_queries is not None:
            constant_queries = constant_queries @ weight + bias
            if query_scale is not None:
                constant_queries = constant_queries * query_scale
            constant_queries = split_heads(constant_queries, self.num_heads)
            query_scale = None
        else:
            self.query = Projection(weight, bias)
        self.register_buffer("query_scale", query_scale)
        self.register_buffer("constant_queries", constant_queries)
        self.key = Projection(attention.k_proj.weight.T, key_pe @ attention.k_proj.weight.T)
        self.value = Projection(attention.v_proj.weight.T, None)
        output = attention.out_proj
        self.output = Projection(
            output.weight.T, output.bias + attention.v_proj.bias @ output.weight.T
        )

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, key_bias: Tensor | None = None
    ) -> Tensor:
        """Attend from (B, Q, D) to keys and values (B, K, D), with `key_bias` (1, 1, 1, K)."""
        keys = split_heads(self.key(keys), self.num_heads)
        values = split_heads(self.value(values), self.num_heads)
        if self.constant_queries is None:
            queries = self.query(queries)
            if self.query_scale is not None:
                queries = queries * self.query_scale
            queries = split_heads(queries, self.num_heads)
        else:
            queries = self.constant_queries
        # Not ONNX's Attention: it cannot broadcast one batch of queries over the images, nor, in
        # ONNX Runtime, a mask over the queries. These products are small.
        return self.output(join_heads(attend(queries, keys, values, key_bias, PLAIN)))  # type: ignore[no-any-return]


class FoldedUpscaling(nn.Module):
    """SAM's upscaling to 4h x 4w and its product with the classes' weights, token by token.

    A transposed convolution with stride and kernel 2 projects each token to 2 x 2 others. Only the
    C maps are reordered to pixels, not the D/8 features.
    """

    def __init__(self, upscaling: nn.Sequential, grid: int) -> None:
        super().__init__()
        first, norm, _, second, _ = cast(Any, upscaling)
        self.grid = grid
        self.first, self.norm, self.second = _fold(first), TokenNorm(norm), _fold(second)
        self.widths = (first.out_channels, second.out_channels)

    def forward(self, keys: Tensor, class_weights: Tensor) -> Tensor:
        """From (B, N, D) and (B, C, D/8) to (B, C, 4h, 4w)."""
        num_tokens = self.grid**2
        upscaled = self.first(keys).reshape(-1, 4 * num_tokens, self.widths[0])
        upscaled = self.second(F.gelu(self.norm(upscaled)))
        upscaled = F.gelu(upscaled).reshape(-1, 16 * num_tokens, self.widths[1])
        logits = class_weights @ upscaled.transpose(1, 2)  # B x C x N*2*2*2*2
        num_classes = class_weights.shape[1]
        logits = logits.reshape(-1, self.grid, self.grid, 2, 2, 2, 2)
        logits = logits.permute(0, 1, 3, 5, 2, 4, 6)
        return logits.reshape(-1, num_classes, 4 * self.grid, 4 * self.grid)


class SkipUpscaling(nn.Module):
    """The upscaling with skip connections, whose 3 x 3 convolutions need maps and not tokens."""

    def __init__(self, decoder: MaskDecoder, grid: int) -> None:
        super().__init__()
        self.first, norm, _, self.second, _ = cast(Any, decoder.output_upscaling)
        self.grid = grid
        self.norm = TokenNorm(norm)
        self.to_eighth, self.to_quarter = cast(Iterable[SkipConnection], decoder.skips)

    def forward(
        self, keys: Tensor, class_weights: Tensor, eighth: Tensor, quarter: Tensor
    ) -> Tensor:
        """From (B, N, D), (B, C, D/8) and the skip connections' maps to (B, C, 4h, 4w)."""
        image = keys.transpose(1, 2).reshape(-1, keys.shape[2], self.grid, self.grid)
        image = self.to_eighth(self.first(image), eighth).permute(0, 2, 3, 1)
        image = self.to_eighth.refined(F.gelu(self.norm(image).permute(0, 3, 1, 2)))
        image = self.to_quarter.refined(F.gelu(self.to_quarter(self.second(image), quarter)))
        logits = class_weights @ image.flatten(2)
        return logits.reshape(-1, class_weights.shape[1], 4 * self.grid, 4 * self.grid)


class TokenMlps(nn.Module):
    """Applies one of SAM's MLPs to each of M tokens, all in one product."""

    def __init__(self, mlps: Sequence[Any], first_output: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        num_layers = len(mlps[0].layers)
        for index in range(num_layers):
            kept = slice(first_output if index == num_layers - 1 else 0, None)
            weights = [mlp.layers[index].weight[kept].T for mlp in mlps]
            biases = [mlp.layers[index].bias[kept][None] for mlp in mlps]
            self.layers.append(Projection(torch.stack(weights), torch.stack(biases)))

    def forward(self, tokens: Tensor) -> Tensor:
        """From (B, M, D) to (B, M, outputs)."""
        tokens = tokens.unsqueeze(2)  # B x M x 1 x D
        for layer in self.layers[:-1]:
            tokens = F.relu(layer(tokens))
        return self.layers[-1](tokens).squeeze(2)  # type: ignore[no-any-return]


class TokenNorm(nn.Module):
    """SAM's LayerNorm2d on (B, N, D). Its bias can include a constant that is added later."""

    weight: Tensor
    bias: Tensor

    def __init__(self, norm: Any, added: Tensor | None = None) -> None:
        super().__init__()
        self.eps: float = norm.eps
        self.register_buffer("weight", norm.weight.detach())
        self.register_buffer("bias", (norm.bias if added is None else norm.bias + added).detach())

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalise the channels of (B, N, D), or of (B, H, W, D)."""
        return F.layer_norm(tokens, list(self.weight.shape), self.weight, self.bias, self.eps)


def _fold(conv: nn.ConvTranspose2d) -> Projection:
    """Write a transposed convolution of stride 2 as a projection to (2 * 2 * out) channels."""
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
    return Projection(weight, cast(Tensor, conv.bias).repeat(4))
