"""SAM's attention with what a class bias adds to it (arXiv 2604.13479, Eq. 1)."""

import math

from segment_anything.modeling.transformer import Attention
from torch import Tensor


class BiasedAttention(Attention):  # type: ignore[misc] # segment_anything has no types
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
