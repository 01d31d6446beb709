"""SAM's mask decoder with one class token per class and the bias in its attention.

SAM: arXiv 2304.02643. SAM-Path (class tokens): arXiv 2307.09570. Shape letters: B images,
D channels, h x w image tokens, C classes, T = 3 + C tokens.
"""

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from segment_anything.modeling import MaskDecoder as SamMaskDecoder
from segment_anything.modeling import TwoWayTransformer
from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor, nn

from train.model.class_bias import NUM_BLOCKS, NUM_HEADS, ClassTerms
from train.model.image_encoder import convolution


class NoPrompt(nn.Module):
    """What is left of SAM's prompt encoder without prompts, under the names of its weights."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pe_layer = PositionEmbeddingRandom(dim // 2)
        self.no_mask_embed = nn.Embedding(1, dim)

    def forward(self, image_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Add "no mask" to (B, D, h, w); returns that and `image_pe` (1, D, h, w)."""
        no_mask = self.no_mask_embed.weight.reshape(1, -1, 1, 1)
        # Angles of up to some turns: bfloat16 would round them by several degrees.
        with torch.autocast(image_embeddings.device.type, enabled=False):
            image_pe = self.pe_layer(image_embeddings.shape[-2:]).unsqueeze(0)
        return image_embeddings + no_mask, image_pe


class BiasedAttention(Attention):  # type: ignore[misc]
    """SAM's attention with an additive bias on the keys (Eq. 1), or a factor on the queries.

    In `cross_attn_image_to_token` the queries are image tokens and the keys class tokens, so a
    bias per key shifts each pixel's attention between classes. In the other direction the softmax
    runs over pixels, where a constant per token cancels.
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_bias: Tensor | None = None,
        query_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend from q (B, Q, D) to k and v (B, K, D).

        Args:
            q: queries.
            k: keys.
            v: values.
            key_bias: added to the logits; (K,) or (H, 1, K).
            query_scale: factors of each query's logits, (Q,).

        Returns:
            (B, Q, D).
        """
        queries = self._separate_heads(self.q_proj(q), self.num_heads)  # B x H x Q x D/H
        keys = self._separate_heads(self.k_proj(k), self.num_heads)
        values = self._separate_heads(self.v_proj(v), self.num_heads)
        if query_scale is not None:
            queries = queries * query_scale[:, None]
        logits = (queries / math.sqrt(queries.shape[-1])) @ keys.transpose(-2, -1)
        if key_bias is not None:
            logits = logits + key_bias  # B x H x Q x K
        attended = self._recombine_heads(logits.softmax(dim=-1) @ values)
        return self.out_proj(attended)  # type: ignore[no-any-return]


class FocalBlock(TwoWayAttentionBlock):  # type: ignore[misc]
    """SAM's two-way block whose cross-attentions take the class terms."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, skip_first_layer_pe: bool) -> None:
        super().__init__(dim, num_heads, mlp_dim, skip_first_layer_pe=skip_first_layer_pe)
        self.cross_attn_token_to_image = BiasedAttention(dim, num_heads, downsample_rate=2)
        self.cross_attn_image_to_token = BiasedAttention(dim, num_heads, downsample_rate=2)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        query_pe: Tensor,
        key_pe: Tensor,
        token_bias: Tensor,
        temperature: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Update tokens `queries` (B, T, D) and image `keys` (B, h*w, D).

        `token_bias` is broadcastable to (B, H, h*w, T), `temperature` (T,) or None.
        """
        queries = self.norm1(self.attend_to_tokens(queries, query_pe))

        positioned_keys = keys + key_pe
        to_image = self.cross_attn_token_to_image(
            q=queries + query_pe, k=positioned_keys, v=keys, query_scale=temperature
        )
        queries = self.norm2(queries + to_image)
        queries = self.norm3(queries + self.mlp(queries))

        to_token = self.cross_attn_image_to_token(
            q=positioned_keys, k=queries + query_pe, v=queries, key_bias=token_bias
        )
        return queries, self.norm4(keys + to_token)

    def attend_to_tokens(self, queries: Tensor, query_pe: Tensor) -> Tensor:
        """Self-attention of the tokens; the first block has neither residual nor position."""
        if self.skip_first_layer_pe:
            return self.self_attn(q=queries, k=queries, v=queries)  # type: ignore[no-any-return]
        positioned = queries + query_pe
        return queries + self.self_attn(q=positioned, k=positioned, v=queries)  # type: ignore[no-any-return]


class FocalTransformer(TwoWayTransformer):  # type: ignore[misc]
    """SAM's two-way transformer of biased blocks."""

    def __init__(
        self,
        dim: int,
        *,
        depth: int = NUM_BLOCKS,
        num_heads: int = NUM_HEADS,
        mlp_dim: int = 2048,
    ) -> None:
        super().__init__(depth=0, embedding_dim=dim, num_heads=num_heads, mlp_dim=mlp_dim)
        self.layers = nn.ModuleList(
            FocalBlock(dim, num_heads, mlp_dim, skip_first_layer_pe=index == 0)
            for index in range(depth)
        )
        self.final_attn_token_to_image = BiasedAttention(dim, num_heads, downsample_rate=2)

    def forward(
        self, image_embeddings: Tensor, image_pe: Tensor, tokens: Tensor, terms: ClassTerms
    ) -> tuple[Tensor, Tensor]:
        """Attend between image (B, D, h, w) and tokens (B, T, D).

        Returns:
            The tokens (B, T, D) and the image (B, h*w, D).
        """
        keys = image_embeddings.flatten(2).transpose(1, 2)
        key_pe = image_pe.flatten(2).transpose(1, 2)
        queries = tokens
        for index, layer in enumerate(self.layers):
            bias = terms.of_block(index)
            queries, keys = layer(queries, keys, tokens, key_pe, bias, terms.temperature)
        to_image = self.final_attn_token_to_image(
            q=queries + tokens, k=keys + key_pe, v=keys, query_scale=terms.temperature
        )
        return self.norm_final_attn(queries + to_image), keys


class MaskDecoder(SamMaskDecoder):  # type: ignore[misc]
    """SAM's mask decoder for a whole batch at once, without prompts.

    Mask tokens are SAM's single-mask token, one for unlabelled pixels, and one class token per
    class.
    """

    def __init__(self, *, dim: int, num_classes: int, skip_dims: tuple[int, ...] = ()) -> None:
        """Build it with random weights, for an encoder whose skip connections have `skip_dims`."""
        super().__init__(
            transformer_dim=dim,
            transformer=FocalTransformer(dim, mlp_dim=8 * dim),
            num_multimask_outputs=1 + num_classes,
        )
        # The single-mask token takes part in the attention, but its mask is dropped.
        self.output_hypernetworks_mlps[0].requires_grad_(False)
        widths = (dim // 4, dim // 8) if skip_dims else ()
        self.skips = nn.ModuleList(
            SkipConnection(skip_dim, width)
            for skip_dim, width in zip(skip_dims, widths, strict=True)
        )

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        terms: ClassTerms,
        skips: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor]:
        """Decode masks.

        Args:
            image_embeddings: (B, D, h, w).
            image_pe: (1, D, h, w), their positions.
            terms: what the class bias adds.
            skips: the encoder's maps, (B, `skip_dims[i]`, 2h, 2w) and then (4h, 4w), if it has any.

        Returns:
            low_res_logits: (B, 1 + C, 4h, 4w), the unlabelled channel first.
            iou_scores: (B, 1 + C), the predicted IoU of each mask.
        """
        batch, dim, height, width = image_embeddings.shape
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = tokens.expand(batch, -1, -1)  # B x T x D
        tokens_out, image_out = self.transformer(image_embeddings, image_pe, tokens, terms)

        image_out = image_out.transpose(1, 2).reshape(batch, dim, height, width)
        upscaled = self.upscale(image_out, skips)  # B x D/8 x 4h x 4w
        class_weights = torch.stack(
            [
                hypernetwork(tokens_out[:, 1 + index])
                for index, hypernetwork in enumerate(self.output_hypernetworks_mlps)
                if index > 0
            ],
            dim=1,
        )  # B x (1 + C) x D/8
        low_res_logits = class_weights @ upscaled.flatten(2)
        low_res_logits = low_res_logits.reshape(batch, -1, *upscaled.shape[-2:])
        if terms.mask_bias is not None:
            low_res_logits = low_res_logits + terms.mask_bias[:, None, None]
        return low_res_logits, self.iou_prediction_head(tokens_out[:, 0])[:, 1:]

    def upscale(self, image: Tensor, skips: Sequence[Tensor]) -> Tensor:
        """Enlarge (B, D, h, w) to (B, D/8, 4h, 4w), with the skip connections if there are any."""
        if not self.skips:
            return self.output_upscaling(image)  # type: ignore[no-any-return]
        first, norm, activation, second, last_activation = self.output_upscaling
        to_eighth, to_quarter = cast(Iterable[SkipConnection], self.skips)
        eighth, quarter = skips
        image = to_eighth.refined(activation(norm(to_eighth(first(image), eighth))))
        return to_quarter.refined(last_activation(to_quarter(second(image), quarter)))


class SkipConnection(nn.Module):
    """Adds an encoder's map to the decoder's of the same size, as SAM 2 does (arXiv 2408.00714).

    SAM's upscaling looks at single pixels only. So the sum goes through a 3 x 3 convolution of the
    stem's kind, which is our choice, as in a U-Net.
    """

    def __init__(self, skip_dim: int, width: int) -> None:
        """Connect maps of `skip_dim` and of `width` channels."""
        super().__init__()
        self.proj = nn.Conv2d(skip_dim, width, 1)
        self.refine = convolution(width, width, stride=1)

    def forward(self, image: Tensor, skip: Tensor) -> Tensor:
        """Add (B, skip_dim, H, W) to (B, width, H, W)."""
        return image + self.proj(skip)  # type: ignore[no-any-return]

    def refined(self, image: Tensor) -> Tensor:
        """Look at each pixel's neighbours, (B, width, H, W) to the same."""
        return image + self.refine(image)  # type: ignore[no-any-return]
