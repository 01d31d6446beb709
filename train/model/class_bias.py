"""The class bias: Dynamic Focal Attention, its siblings, and what we add (arXiv 2604.13479).

A strategy is an entry of `STRATEGIES`. The command line's `--bias`, the rows of the comparison, its
tables and its report derive from the entries; a new strategy is one more entry here.

Shape letters: B images, N image tokens, T = 3 + C tokens (iou, single-mask, unlabelled, then the
C classes), L two-way blocks, H attention heads, D channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.errors import BaselineError, SettingsError
from train.settings import BiasSettings

NUM_LEADING_TOKENS = 3
"""Tokens before the class tokens that get no bias: iou, single-mask, unlabelled."""
NUM_BLOCKS, NUM_HEADS = 2, 8
"""Two-way blocks of SAM's decoder, and heads of their attention."""


class ClassTerms(NamedTuple):
    """What a strategy adds to the decoder, by token.

    attention_bias: (T,) or (L, H, T), added to the logits of the image-to-token attention (Eq. 1).
    temperature: (T,) factors of the logits of the token-to-image attention, or None.
    mask_bias: (1 + C,), added to the mask logits, the unlabelled channel first, or None.
    """

    attention_bias: Tensor
    temperature: Tensor | None = None
    mask_bias: Tensor | None = None

    def of_block(self, block: int) -> Tensor:
        """The attention bias of one block, broadcastable to (B, H, N, T)."""
        if self.attention_bias.dim() == 1:
            return self.attention_bias
        return self.attention_bias[block].unsqueeze(1)


class ClassAttentionBias(nn.Module):
    """One scalar per class, shared by both blocks and all heads (Eq. 4)."""

    prior: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(self._shape(num_classes)))
        self.register_buffer("prior", torch.zeros_like(self.delta.data), persistent=False)

    def start(self, initial: Tensor, *, learned: bool) -> None:
        """Set every bias to its class's initial value (C,), and say whether training changes it."""
        with torch.no_grad():
            self.prior.copy_(initial.expand_as(self.prior))
            self.delta.copy_(self.prior)
        self.requires_grad_(learned)

    def forward(self) -> ClassTerms:
        """The terms of every token; 0 for tokens that are not a class."""
        return ClassTerms(F.pad(self.delta, (NUM_LEADING_TOKENS, 0)))

    @torch.no_grad()
    def per_class(self, values: Tensor | None = None) -> Tensor:
        """`values` in the shape of delta, or delta, as (C,): averaged over blocks and heads."""
        values = self.delta.detach() if values is None else values
        return values.reshape(-1, values.shape[-1]).mean(dim=0)

    @torch.no_grad()
    def approach_prior(self, rate: float) -> None:
        """Move by the share `rate` of the distance to where training started."""
        self.delta.lerp_(self.prior, min(rate, 1.0))

    def _shape(self, num_classes: int) -> tuple[int, ...]:
        return (num_classes,)


class HeadBias(ClassAttentionBias):
    """One scalar per class, block and head (our extension of Eq. 4)."""

    def _shape(self, num_classes: int) -> tuple[int, ...]:
        return (NUM_BLOCKS, NUM_HEADS, num_classes)


class TemperedBias(ClassAttentionBias):
    """Eq. 4, and a temperature per class in the token-to-image attention (ours).

    That softmax runs over pixels, where a constant per token cancels and a factor does not: it
    decides how sharply a class token looks at its best pixels. It starts at 1.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.log_temperature = nn.Parameter(torch.zeros(num_classes))

    @torch.no_grad()
    def approach_prior(self, rate: float) -> None:
        """Move the bias towards its start, and the temperature towards 1."""
        super().approach_prior(rate)
        self.log_temperature.mul_(1 - min(rate, 1.0))

    def forward(self) -> ClassTerms:
        """The bias, and exp(log_temperature) as a factor of the logits."""
        factors = F.pad(self.log_temperature, (NUM_LEADING_TOKENS, 0)).exp()
        return super().forward()._replace(temperature=factors)


class MaskBias(ClassAttentionBias):
    """Eq. 4, and the same bias added to the mask logits, where classes compete (ours)."""

    def forward(self) -> ClassTerms:
        """The bias in both places."""
        return super().forward()._replace(mask_bias=F.pad(self.delta, (1, 0)))


@dataclass(frozen=True)
class ClassStatistics:
    """What an initial bias may depend on.

    frequencies: (C,) each class's share of the labelled training pixels, in (0, 1].
    baseline_dice: (C,) Dice of a trained baseline, in [0, 1]; NaN for a class that is absent from
        its validation tiles. None where there is no baseline.
    """

    frequencies: Tensor
    baseline_dice: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class BiasStrategy:
    """One way to bias the attention by class."""

    name: str
    """What the command line and a run's settings call it."""
    title: str
    """Its name in tables and figures."""
    help: str
    """One sentence: what it does, and its source."""
    initial: Callable[[BiasSettings, ClassStatistics], Tensor]
    """The bias before training, (C,)."""
    learned: bool = False
    """Whether training changes it."""
    needs_baseline: bool = False
    """Whether `initial` needs a trained baseline's Dice."""
    in_paper: bool = False
    """Whether arXiv 2604.13479 compares it."""
    module: type[ClassAttentionBias] = ClassAttentionBias
    """The module that it adds to the decoder."""


def no_bias(settings: BiasSettings, statistics: ClassStatistics) -> Tensor:
    """Zero."""
    return torch.zeros_like(statistics.frequencies)


def frequency_bias(settings: BiasSettings, statistics: ClassStatistics) -> Tensor:
    """-gamma log(f): Eq. 2 in our form."""
    return -settings.bias_gamma * torch.log(statistics.frequencies + settings.bias_epsilon)


def difficulty_bias(settings: BiasSettings, statistics: ClassStatistics) -> Tensor:
    """Gamma log(C d), d the normalised difficulty 1 - Dice: Eq. 3 in our form.

    A class without a Dice counts as of mean difficulty, and its bias is 0: nothing is known of it.

    Raises:
        BaselineError: there is no baseline's Dice.
    """
    if statistics.baseline_dice is None:
        raise BaselineError(
            "--bias hcfa needs the Dice of a trained baseline, and none was given. Train one with "
            "`--bias none`, then pass its folder with `--difficulty-from`."
        )
    difficulty = 1 - statistics.baseline_dice + settings.bias_epsilon
    relative = difficulty / difficulty.nanmean()
    return settings.bias_gamma * torch.log(relative.nan_to_num(1.0))


def centred_prior(settings: BiasSettings, statistics: ClassStatistics) -> Tensor:
    """Gamma (m - log f), m the mean of log f: the warm start of Eq. 6; zero for a cold start."""
    if settings.bias_init == "cold":
        return torch.zeros_like(statistics.frequencies)
    logarithms = torch.log(statistics.frequencies + settings.bias_epsilon)
    return settings.bias_gamma * (logarithms.mean() - logarithms)


STRATEGIES: dict[str, BiasStrategy] = {
    strategy.name: strategy
    for strategy in (
        BiasStrategy(
            name="none",
            title="Base w/ FL",
            help="SAM-Path (arXiv 2307.09570), no bias.",
            initial=no_bias,
            in_paper=True,
        ),
        BiasStrategy(
            name="cffa",
            title="CFFA",
            help="From class frequency, fixed (Eq. 2; the form -gamma log f is our choice).",
            initial=frequency_bias,
            in_paper=True,
        ),
        BiasStrategy(
            name="hcfa",
            title="HCFA",
            help="From a baseline's Dice, fixed (Eq. 3; the form gamma log C d, with d the share "
            "of 1 - Dice, is our choice).",
            initial=difficulty_bias,
            needs_baseline=True,
            in_paper=True,
        ),
        BiasStrategy(
            name="dfa",
            title="DFA",
            help="Learned, one scalar per class (Eq. 4).",
            initial=centred_prior,
            learned=True,
            in_paper=True,
        ),
        BiasStrategy(
            name="dfa_heads",
            title="DFA per head",
            help="Learned, one scalar per class, block and head (ours).",
            initial=centred_prior,
            learned=True,
            module=HeadBias,
        ),
        BiasStrategy(
            name="dfa_temperature",
            title="DFA + temperature",
            help="dfa, and a learned temperature per class in the token-to-image attention (ours).",
            initial=centred_prior,
            learned=True,
            module=TemperedBias,
        ),
        BiasStrategy(
            name="dfa_masks",
            title="DFA + masks",
            help="dfa, and the same bias added to the mask logits (ours).",
            initial=centred_prior,
            learned=True,
            module=MaskBias,
        ),
    )
}


def find_strategy(name: str) -> BiasStrategy:
    """Look up a registered strategy.

    Raises:
        SettingsError: no strategy has that name.
    """
    if name not in STRATEGIES:
        raise SettingsError(
            f"bias is {name!r}, expected one of {', '.join(STRATEGIES)}. Change --bias."
        )
    return STRATEGIES[name]
