"""The bias a class: Dynamic Focal Attention and its siblings (arXiv 2604.13479).

Shape letters: B images, N image tokens, T = 3 + C tokens (iou, single-mask, unlabelled, then the
C classes), D channels.
"""

import math

import torch
import torch.nn.functional as F
from segment_anything.modeling.transformer import Attention
from torch import Tensor, nn

from train.errors import FocalPathError
from train.settings import BiasSettings

NUM_LEADING_TOKENS = 3
"""Tokens before the class tokens that get no bias: iou, single-mask, unlabelled."""


def initial_bias(
    settings: BiasSettings, frequencies: Tensor, baseline_dice: Tensor | None = None
) -> Tensor:
    """The bias before training.

    Args:
        settings: The strategy and its magnitude.
        frequencies: (C,) each class's share of the labelled training pixels, in (0, 1].
        baseline_dice: (C,) Dice of a trained baseline, in [0, 1]; only for hcfa.

    Returns:
        (C,) float32. none: 0. cffa: -gamma log(f), Eq. 2 in our form. hcfa: gamma log(C d) with
        d the normalised difficulty 1 - Dice, Eq. 3 in our form. dfa: the centred log-frequency
        prior of Eq. 6, or zero when cold.

    Raises:
        FocalPathError: hcfa without a baseline's Dice.
    """
    gamma, epsilon = settings.bias_gamma, settings.bias_epsilon
    if settings.bias == "cffa":
        return -gamma * torch.log(frequencies + epsilon)
    if settings.bias == "hcfa":
        if baseline_dice is None:
            raise FocalPathError(
                "hcfa needs the Dice of a trained baseline, and none was given. Train one with "
                "`--bias none`, then pass its folder with `--difficulty-from`."
            )
        difficulty = 1 - baseline_dice + epsilon
        return gamma * torch.log(len(difficulty) * difficulty / difficulty.sum())
    if settings.bias == "dfa" and settings.bias_init == "warm":
        log_frequencies = torch.log(frequencies + epsilon)
        return gamma * (log_frequencies.mean() - log_frequencies)
    return torch.zeros_like(frequencies)


class ClassAttentionBias(nn.Module):
    """One scalar a class, shared by both blocks and all heads (Eq. 4)."""

    def __init__(self, initial: Tensor, *, learned: bool) -> None:
        super().__init__()
        self.delta = nn.Parameter(initial.clone(), requires_grad=learned)

    def forward(self) -> Tensor:
        """The bias of every token, (T,): 0 for tokens that are no class."""
        return F.pad(self.delta, (NUM_LEADING_TOKENS, 0))


class BiasedAttention(Attention):  # type: ignore[misc] # segment_anything has no types
    """SAM's attention with an additive bias on the keys (Eq. 1).

    In `cross_attn_image_to_token` the queries are image tokens and the keys class tokens, so a
    bias a key shifts each pixel's attention between classes. In the other direction the softmax
    runs over pixels, where a constant a token cancels.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None) -> Tensor:
        """Attend from q (B, N, D) to k and v (B, T, D) with key_bias (T,); returns (B, N, D)."""
        queries = self._separate_heads(self.q_proj(q), self.num_heads)  # B x heads x N x D/heads
        keys = self._separate_heads(self.k_proj(k), self.num_heads)
        values = self._separate_heads(self.v_proj(v), self.num_heads)
        logits = (queries / math.sqrt(queries.shape[-1])) @ keys.transpose(-2, -1)
        if key_bias is not None:
            logits = logits + key_bias  # B x heads x N x T
        attended = self._recombine_heads(logits.softmax(dim=-1) @ values)
        return self.out_proj(attended)  # type: ignore[no-any-return]
