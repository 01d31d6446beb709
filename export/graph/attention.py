"""Export forms of the encoders' attention: the same results, written so that runtimes are fast.

All forms fold three things. The scale moves into the queries' projection. The keys' bias is
dropped: it adds the same value to all logits of a query, which the softmax ignores. The values'
bias moves behind the softmax, whose weights sum to 1, into the output projection.

SAM pads tokens with zeros after the norm. After the folding, their keys and values are zero, too.
So padding after the projections is exact.

Shape letters: B images, N = h*w tokens, D channels, d channels per head, w x w tokens per window.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import Attention as SamAttention
from segment_anything.modeling.image_encoder import get_rel_pos
from torch import Tensor, nn

Positions = Literal["dense", "extended"]


@dataclass(frozen=True, kw_only=True)
class AttentionForm:
    """How attention is written in the graph. The results are the same."""

    positions: Positions = "dense"
    """Form of SAM's relative position. dense: a bias (B, heads, N, N). extended: appends (h + w)
    position logits to the queries, and one-hot rows and columns to the keys."""
    max_queries: int | None = 512
    """Largest number of queries per product, which bounds the memory of the logits. None takes all
    queries at once."""
    operator: bool = False
    """Write ONNX's Attention operator where possible. Needs opset 23."""
    fused: bool = False
    """Call torch's fused attention, to run in torch instead of exporting."""

    def num_chunks(self, num_queries: int) -> int:
        """Number of chunks that `num_queries` queries are split into."""
        return -(-num_queries // (self.max_queries or num_queries))


PLAIN = AttentionForm()


class Projection(nn.Module):
    """x W + b with W (in, out), as in ONNX's MatMul. The bias may be None."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().contiguous())

    @classmethod
    def of(cls, linear: nn.Linear) -> Self:
        """Convert a linear layer."""
        return cls(linear.weight.T, linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Project (..., in) to (..., out)."""
        projected = tokens @ self.weight
        return projected if self.bias is None else projected + self.bias


class FusedProjections(nn.Module):
    """The four projections of self-attention, with scale and biases folded."""

    def __init__(self, qkv: nn.Linear, proj: nn.Linear, num_heads: int, scale: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        query, key, value = qkv.weight.detach().T.chunk(3, dim=1)
        biases = torch.zeros(3 * query.shape[1]) if qkv.bias is None else qkv.bias.detach()
        query_bias, _, value_bias = biases.chunk(3)
        self.query = Projection(query * scale, query_bias * scale)
        self.key = Projection(key, None)
        self.value = Projection(value, None)
        output_bias = value_bias @ proj.weight.T
        self.output = Projection(
            proj.weight.T, output_bias if proj.bias is None else output_bias + proj.bias
        )


class PathologyAttention(FusedProjections):
    """Self-attention of timm's plain vision transformer."""

    def __init__(self, attention: Any, form: AttentionForm) -> None:
        super().__init__(attention.qkv, attention.proj, attention.num_heads, attention.scale)
        self.form = form

    @staticmethod
    def fits(attention: nn.Module) -> bool:
        """Whether this form covers everything that the module does."""
        unused = [getattr(attention, name, None) for name in ("q_norm", "k_norm", "norm")]
        return (
            type(attention).__name__ == "Attention"
            and type(attention).__module__.startswith("timm.")
            and all(isinstance(module, nn.Identity) for module in unused)
            and getattr(attention, "gate", None) is None
        )

    def forward(self, tokens: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """Attend among (B, N, D)."""
        assert attn_mask is None, "all tokens of a tile see each other"
        assert not is_causal, "the tokens of a tile have no order"
        queries, keys, values = (
            split_heads(projection(tokens), self.num_heads)
            for projection in (self.query, self.key, self.value)
        )
        attended = _joined(
            attend(part, keys, values, None, self.form)
            for part in _chunks(queries, self.form.num_chunks(queries.shape[2]))
        )
        return self.output(join_heads(attended))  # type: ignore[no-any-return]


class PositionedAttention(FusedProjections):
    """SAM's self-attention with decomposed relative position, on a grid of g x g tokens.

    Attributes:
        rows, columns: (g, d, g), SAM's tables divided by the scale of the queries, indexed by the
            query's and the key's row or column.
        one_hot: (1, 1, g*g, d + 2*g rounded up to a multiple of 8), the row and column of each
            key; only in the extended form.
    """

    rows: Tensor
    columns: Tensor
    one_hot: Tensor

    def __init__(self, attention: SamAttention, grid: int, form: AttentionForm) -> None:
        super().__init__(attention.qkv, attention.proj, attention.num_heads, attention.scale)
        self.grid, self.form = grid, form
        for name, table in (("rows", attention.rel_pos_h), ("columns", attention.rel_pos_w)):
            positions = get_rel_pos(grid, grid, table.detach()).transpose(1, 2)
            self.register_buffer(name, (positions / attention.scale).contiguous())
        if form.positions == "dense":
            return
        place, head_dim = torch.arange(grid**2), attention.rel_pos_h.shape[1]
        one_hot = torch.zeros(1, 1, grid**2, -(-(head_dim + 2 * grid) // 8) * 8)
        one_hot[0, 0, place, head_dim + place // grid] = 1
        one_hot[0, 0, place, head_dim + grid + place % grid] = 1
        self.register_buffer("one_hot", one_hot)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend with SAM's relative position (arXiv 2304.02643, after arXiv 2112.01526).

        For the key in row i and column j, a query's logit gains `row_logits[i] + column_logits[j]`.
        Both depend on the query's content and position.
        """
        num_chunks = self.form.num_chunks(queries.shape[2])
        side = self.grid
        queries = queries.reshape(-1, self.num_heads, side, side, queries.shape[3])
        row_logits = queries @ self.rows  # B x heads x h x w x rows
        column_logits = (queries.transpose(2, 3) @ self.columns).transpose(2, 3)
        if self.form.positions == "extended":
            padding = self.one_hot.shape[-1] - queries.shape[-1] - 2 * side
            keys = F.pad(keys, (0, self.one_hot.shape[-1] - keys.shape[-1])) + self.one_hot
            queries = torch.cat([queries, row_logits, column_logits], dim=-1)
            queries = F.pad(queries, (0, padding)) if padding else queries
            return _joined(
                attend(part.flatten(2, 3), keys, values, None, self.form)
                for part in _chunks(queries, num_chunks)
            )
        chunks = (_chunks(whole, num_chunks) for whole in (queries, row_logits, column_logits))
        return _joined(
            attend(part.flatten(2, 3), keys, values, _dense_bias(in_row, in_column), self.form)
            for part, in_row, in_column in zip(*chunks, strict=True)
        )


class GlobalAttention(PositionedAttention):
    """Attention over the whole image."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend among (B, N, D), row by row."""
        queries, keys, values = (
            split_heads(projection(tokens), self.num_heads)
            for projection in (self.query, self.key, self.value)
        )
        return self.output(join_heads(self.attend(queries, keys, values)))  # type: ignore[no-any-return]


class WindowAttention(PositionedAttention):
    """Attention inside w x w windows. Zeros pad the last windows.

    Padded tokens act as keys. The projections run on the real tokens only.
    """

    def __init__(
        self, attention: SamAttention, side: int, window_size: int, form: AttentionForm
    ) -> None:
        super().__init__(attention, window_size, form)
        self.tokens_per_side = side
        self.windows_per_side = -(-side // window_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend inside the windows of (B, N, D), row by row."""
        queries, keys, values = (
            self._partition(projection(tokens)) for projection in (self.query, self.key, self.value)
        )
        return self.output(self._join(self.attend(queries, keys, values)))  # type: ignore[no-any-return]

    def _partition(self, tokens: Tensor) -> Tensor:
        """Split (B, N, D) into (B * windows, heads, w*w, d)."""
        side, window, dim = self.tokens_per_side, self.grid, tokens.shape[-1]
        count, head_dim = self.windows_per_side, dim // self.num_heads
        if missing := count * window - side:
            tokens = tokens.reshape(-1, side, side, dim)
            tokens = F.pad(tokens, (0, 0, 0, missing, 0, missing))
        tokens = tokens.reshape(-1, count, window, count, window, self.num_heads, head_dim)
        tokens = tokens.permute(0, 1, 3, 5, 2, 4, 6)
        return tokens.reshape(-1, self.num_heads, window**2, head_dim)

    def _join(self, attended: Tensor) -> Tensor:
        """Join (B * windows, heads, w*w, d) to the real tokens (B, N, D)."""
        side, window, count = self.tokens_per_side, self.grid, self.windows_per_side
        head_dim = attended.shape[-1]
        dim = self.num_heads * head_dim
        tokens = attended.reshape(-1, count, count, self.num_heads, window, window, head_dim)
        tokens = tokens.permute(0, 1, 4, 2, 5, 3, 6)
        tokens = tokens.reshape(-1, count * window, count * window, dim)
        return tokens[:, :side, :side].reshape(-1, side**2, dim)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, form: AttentionForm
) -> Tensor:
    """Attend from scaled queries (B, heads, Q, d) to keys and values (B, heads, K, d).

    `bias` is added to the logits and broadcasts to (B, heads, Q, K).
    """
    if form.operator and queries.shape[-1] == values.shape[-1]:
        attended: Tensor = torch.onnx.ops.attention(queries, keys, values, bias, scale=1.0)[0]
        return attended
    if form.fused:
        return F.scaled_dot_product_attention(queries, keys, values, bias, scale=1.0)
    logits = queries @ keys.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    return logits.softmax(dim=-1) @ values


def _chunks(queries: Tensor, num_chunks: int) -> Sequence[Tensor]:
    """Cut (B, heads, Q, ...) along the queries."""
    return queries.chunk(num_chunks, dim=2) if num_chunks > 1 else (queries,)


def _joined(parts: Iterable[Tensor]) -> Tensor:
    parts = tuple(parts)
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _dense_bias(row_logits: Tensor, column_logits: Tensor) -> Tensor:
    """Add (B, heads, h, w, rows) and (B, heads, h, w, columns): (B, heads, h*w, rows*columns)."""
    bias = row_logits[..., None] + column_logits[..., None, :]
    return bias.flatten(4, 5).flatten(2, 3)


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """Split (B, N, D) into (B, heads, N, d)."""
    tokens = tokens.reshape(-1, tokens.shape[1], num_heads, tokens.shape[2] // num_heads)
    return tokens.transpose(1, 2)


def join_heads(attended: Tensor) -> Tensor:
    """Join (B, heads, N, d) to (B, N, D)."""
    return attended.transpose(1, 2).flatten(2)
