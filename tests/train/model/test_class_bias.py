import math
from pathlib import Path

import pytest
import torch
from segment_anything.modeling import MaskDecoder as SamMaskDecoder
from segment_anything.modeling import TwoWayTransformer
from torch import Tensor

from tests.support.errors import raises
from train.errors import BaselineError
from train.model.class_bias import (
    STRATEGIES,
    BiasStrategy,
    ClassAttentionBias,
    ClassStatistics,
    ClassTerms,
)
from train.model.mask_decoder import BiasedAttention, MaskDecoder
from train.settings import BiasSettings

DIM, NUM_CLASSES = 32, 5
FREQUENCIES = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01])
BIAS = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
NO_TERMS = ClassTerms(torch.zeros(3 + NUM_CLASSES))


@pytest.fixture
def decoder() -> MaskDecoder:
    torch.manual_seed(0)
    return MaskDecoder(dim=DIM, num_classes=NUM_CLASSES).eval()


@pytest.fixture
def image() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, DIM, 4, 4), torch.randn(1, DIM, 4, 4)


def started(values: Tensor) -> ClassAttentionBias:
    bias = ClassAttentionBias(len(values))
    bias.start(values, learned=True)
    return bias


def initial_bias(
    name: str, settings: BiasSettings | None = None, dice: Tensor | None = None
) -> Tensor:
    statistics = ClassStatistics(FREQUENCIES, dice)
    return STRATEGIES[name].initial(settings or BiasSettings(), statistics)


def test_zero_bias_equals_sams_own_decoder(decoder: MaskDecoder, image: tuple[Tensor, Tensor]):
    transformer = TwoWayTransformer(depth=2, embedding_dim=DIM, num_heads=8, mlp_dim=8 * DIM)
    sam = SamMaskDecoder(
        transformer_dim=DIM, transformer=transformer, num_multimask_outputs=1 + NUM_CLASSES
    ).eval()
    sam.load_state_dict(decoder.state_dict())
    embeddings, image_pe = image
    ours, our_iou = decoder(embeddings, image_pe, NO_TERMS)
    for index, embedding in enumerate(embeddings):
        masks, iou = sam(
            embedding[None],
            image_pe,
            sparse_prompt_embeddings=torch.zeros(1, 0, DIM),
            dense_prompt_embeddings=torch.zeros(1, DIM, 4, 4),
            multimask_output=True,
        )
        torch.testing.assert_close(ours[index], masks[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(our_iou[index], iou[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("block", [0, 1])
def test_each_block_alone_uses_the_bias(
    decoder: MaskDecoder, image: tuple[Tensor, Tensor], block: int
):
    unbiased, _ = decoder(*image, NO_TERMS)
    attention = decoder.transformer.layers[1 - block].cross_attn_image_to_token
    forward = attention.forward
    attention.forward = lambda q, k, v, key_bias: forward(q, k, v)
    biased, _ = decoder(*image, started(BIAS)())
    assert (biased - unbiased).abs().max() > 1e-4


def test_a_large_bias_draws_the_attention_of_every_pixel_to_its_class(
    decoder: MaskDecoder, image: tuple[Tensor, Tensor]
):
    attention = decoder.transformer.layers[0].cross_attn_image_to_token
    taken: list[tuple[Tensor, Tensor]] = []
    attention.register_forward_hook(
        lambda module, _, given, found: taken.append((module.v_proj(given["v"]), found)),
        with_kwargs=True,
    )
    decoder(*image, started(torch.tensor([0.0, 0.0, 1e4, 0.0, 0.0]))())
    ((values, found),) = taken
    alone = attention.out_proj(values[:, 3 + 2, None]).expand_as(found)
    torch.testing.assert_close(found, alone)


def test_a_temperature_reaches_every_attention_of_the_tokens_to_the_image(
    decoder: MaskDecoder, image: tuple[Tensor, Tensor]
):
    given: list[Tensor] = []
    for module in decoder.transformer.modules():
        if isinstance(module, BiasedAttention):
            module.register_forward_hook(
                lambda module, _, taken, found: given.append(taken.get("query_scale")),
                with_kwargs=True,
            )
    bias = STRATEGIES["dfa_temperature"].module(NUM_CLASSES)
    with torch.no_grad():
        bias.log_temperature.copy_(BIAS)
    decoder(*image, bias())
    scales = [scale.tolist() for scale in given if scale is not None]
    assert scales == [pytest.approx([1.0] * 3 + BIAS.exp().tolist())] * 3


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_a_bias_that_is_not_learned_stays_as_it_started(strategy: BiasStrategy):
    bias = strategy.module(NUM_CLASSES)
    bias.start(BIAS, learned=strategy.learned)
    assert {parameter.requires_grad for parameter in bias.parameters()} == {strategy.learned}


class QueryBiasedAttention(BiasedAttention):
    """The same bias a token, put into an attention whose queries are the tokens."""

    query_bias: Tensor

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        queries = self._separate_heads(self.q_proj(q), self.num_heads)
        keys = self._separate_heads(self.k_proj(k), self.num_heads)
        values = self._separate_heads(self.v_proj(v), self.num_heads)
        logits = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
        logits = logits + self.query_bias[:, None]
        return self.out_proj(self._recombine_heads(logits.softmax(dim=-1) @ values))


def test_bias_in_token_to_image_attention_would_be_a_no_op(
    decoder: MaskDecoder, image: tuple[Tensor, Tensor]
):
    unbiased, _ = decoder(*image, NO_TERMS)
    delta = started(BIAS)
    for layer in decoder.transformer.layers:
        other = QueryBiasedAttention(DIM, num_heads=8, downsample_rate=2)
        other.load_state_dict(layer.cross_attn_token_to_image.state_dict())
        other.query_bias = delta().attention_bias
        layer.cross_attn_token_to_image = other
    biased, _ = decoder(*image, NO_TERMS)
    torch.testing.assert_close(biased, unbiased, atol=1e-5, rtol=0)
    biased.square().sum().backward()
    assert delta.delta.grad is not None
    assert delta.delta.grad.abs().max() < 1e-4 * biased.square().sum()


def test_attention_probabilities_follow_equation_1():
    torch.manual_seed(0)
    attention = BiasedAttention(8, num_heads=1)
    image_tokens, class_tokens = torch.randn(1, 6, 8), torch.randn(1, 3, 8)
    bias = torch.tensor([0.5, -1.0, 2.0])
    queries, keys = attention.q_proj(image_tokens)[0], attention.k_proj(class_tokens)[0]
    scores = (queries @ keys.T) / math.sqrt(8)
    alpha = (scores + bias).exp() / (scores + bias).exp().sum(dim=1, keepdim=True)
    expected = attention.out_proj(alpha @ attention.v_proj(class_tokens)[0])
    found = attention(image_tokens, class_tokens, class_tokens, key_bias=bias)[0]
    torch.testing.assert_close(found, expected)


def test_tokens_that_are_no_class_get_no_bias():
    torch.testing.assert_close(started(BIAS)().attention_bias, torch.cat([torch.zeros(3), BIAS]))


def test_warm_start_is_centred_and_highest_for_the_rarest_class():
    bias = initial_bias("dfa")
    assert bias.mean().abs() < 1e-6
    assert bias.tolist() == sorted(bias.tolist())
    expected = 0.5 * (math.log(0.5 + 1e-6) - math.log(0.01 + 1e-6))
    assert float(bias[4] - bias[0]) == pytest.approx(expected, rel=1e-4)


def test_cold_start_and_no_bias_are_zero():
    cold = initial_bias("dfa", BiasSettings(bias_init="cold"))
    none = initial_bias("none")
    assert not cold.any()
    assert not none.any()


def test_cffa_is_minus_gamma_log_frequency():
    bias = initial_bias("cffa", BiasSettings(bias_gamma=0.7))
    torch.testing.assert_close(bias, -0.7 * FREQUENCIES.log(), atol=1e-3, rtol=0)


def test_hcfa_is_highest_for_the_hardest_class_and_finite_at_both_ends():
    dice = torch.tensor([0.9, 0.8, 0.5, 0.0, 1.0])
    bias = initial_bias("hcfa", dice=dice)
    assert torch.isfinite(bias).all()
    assert bias.argmax() == 3
    assert bias.argmin() == 4


def test_hcfa_is_the_difficulty_over_its_mean():
    dice = torch.tensor([0.9, 0.5, 0.7, 0.8, 0.6])
    settings = BiasSettings(bias_gamma=2.0)
    found = STRATEGIES["hcfa"].initial(settings, ClassStatistics(torch.full((5,), 0.2), dice))
    by_hand = [2 * math.log(5 * (1 - d) / 1.5) for d in dice.tolist()]  # gamma log(C d)
    assert found.tolist() == pytest.approx(by_hand, abs=1e-4)


def test_hcfa_gives_a_class_without_a_dice_no_bias_and_the_others_what_they_have_without_it():
    dice = torch.tensor([0.9, 0.8, 0.5, math.nan, 0.6])
    bias = initial_bias("hcfa", dice=dice)
    assert bias[3] == 0
    others = torch.tensor([0, 1, 2, 4])
    alone = STRATEGIES["hcfa"].initial(
        BiasSettings(), ClassStatistics(FREQUENCIES[others], dice[others])
    )
    torch.testing.assert_close(bias[others], alone)


def test_hcfa_without_a_baseline_says_what_to_run():
    with raises(BaselineError, "--difficulty-from"):
        initial_bias("hcfa")


def test_the_docs_name_every_strategy():
    text = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
    assert [name for name in STRATEGIES if f"| `{name}` |" not in text] == []


LEARNED = [name for name, strategy in STRATEGIES.items() if strategy.learned]


@pytest.mark.parametrize("name", LEARNED)
def test_every_parameter_of_a_learned_strategy_changes_the_masks_and_has_a_gradient(
    decoder: MaskDecoder, image: tuple[Tensor, Tensor], name: str
):
    bias = STRATEGIES[name].module(NUM_CLASSES)
    bias.start(initial_bias(name), learned=True)
    masks, _ = decoder(*image, bias())
    masks.square().sum().backward()
    for parameter in bias.parameters():
        assert parameter.grad is not None
        assert (parameter.grad.abs() > 1e-6).all()
        with torch.no_grad():
            parameter.add_(BIAS)
        other, _ = decoder(*image, bias())
        assert (other - masks).abs().max() > 1e-4
        with torch.no_grad():
            parameter.sub_(BIAS)


@pytest.mark.parametrize("name", ["dfa_heads", "dfa_temperature"])
def test_our_strategies_start_as_dfa(decoder: MaskDecoder, image: tuple[Tensor, Tensor], name: str):
    bias = STRATEGIES[name].module(NUM_CLASSES)
    bias.start(BIAS, learned=True)
    expected, _ = decoder(*image, started(BIAS)())
    torch.testing.assert_close(decoder(*image, bias())[0], expected)
    torch.testing.assert_close(bias.per_class(), BIAS)


def test_a_bias_approaches_its_prior_and_a_temperature_one():
    bias = STRATEGIES["dfa_temperature"].module(NUM_CLASSES)
    bias.start(BIAS, learned=True)
    with torch.no_grad():
        bias.delta.add_(2.0)
        bias.log_temperature.fill_(1.0)
    bias.approach_prior(0.25)
    torch.testing.assert_close(bias.delta.detach(), BIAS + 1.5)
    torch.testing.assert_close(bias.log_temperature.detach(), torch.full((NUM_CLASSES,), 0.75))
