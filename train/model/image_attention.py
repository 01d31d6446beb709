"""SAM's attention with relative positions, in a form that torch's fused attention computes.

SAM adds a logit for the distance in rows and one for the distance in columns to every pair of a
query and a key (arXiv 2304.02643; the decomposition is MViTv2's, arXiv 2112.01526, Eq. 4). Its own
code writes the matrix of all logits to memory: 4096 x 4096 for each head of a tile of 1024 pixels.

Shape letters: B images or windows, H heads, h x w tokens, N = h*w, d channels per head.
"""

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor


class ImageAttention(Attention):  # type: ignore[misc] # segment_anything has no types
    """SAM's attention without the matrix of logits; the weights have its names.

    The logit of the row distance depends on the query and on the key's row alone. So it is a dot
    product of the query's logits for all rows with the key's row, one-hot. The same holds for
    columns. Appended to the queries and keys, both become part of one product.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Attend among the tokens (B, h, w, H*d) of each image or window."""
        if not x.is_cuda:  # a CPU is faster with the matrix in its cache
            return super().forward(x)  # type: ignore[no-any-return]
        return fused_attention(self, x)


def fused_attention(attention: Attention, x: Tensor) -> Tensor:
    """What SAM's attention computes of (B, h, w, H*d), with torch's fused attention."""
    batch, height, width, _ = x.shape
    qkv = attention.qkv(x).reshape(batch, height * width, 3, attention.num_heads, -1)
    queries, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # B x H x N x d
    grid = queries.unflatten(2, (height, width))
    rows = torch.einsum("bnhwc,hkc->bnhwk", grid, relative(attention.rel_pos_h, height))
    columns = torch.einsum("bnhwc,wkc->bnhwk", grid, relative(attention.rel_pos_w, width))
    places = _one_hot_places(height, width, keys).expand(*keys.shape[:2], -1, -1)
    attended = F.scaled_dot_product_attention(
        torch.cat([queries * attention.scale, rows.flatten(2, 3), columns.flatten(2, 3)], dim=-1),
        torch.cat([keys, places], dim=-1),
        F.pad(values, (0, height + width)),  # flash attention wants one width for all three
        scale=1.0,
    )[..., : values.shape[-1]]
    attended = attended.transpose(1, 2).reshape(batch, height, width, -1)
    return attention.proj(attended)  # type: ignore[no-any-return]


def relative(positions: Tensor, size: int) -> Tensor:
    """Lay (2 * size - 1, d) positions out by place of query and key, (size, size, d).

    SAM's own code makes the indices on the CPU, so that a GPU has to wait for them in every block.
    """
    assert len(positions) == 2 * size - 1, "built for this grid"
    place = torch.arange(size, device=positions.device)
    return positions[place[:, None] - place + size - 1]


def _one_hot_places(height: int, width: int, like: Tensor) -> Tensor:
    """Each token's row and column, (N, h + w), one-hot."""
    rows = torch.eye(height, dtype=like.dtype, device=like.device).repeat_interleave(width, dim=0)
    columns = torch.eye(width, dtype=like.dtype, device=like.device).repeat(height, 1)
    return torch.cat([rows, columns], dim=1)
