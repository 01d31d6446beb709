import pytest
import torch
from segment_anything.modeling.image_encoder import Attention, window_partition, window_unpartition
from timm.layers.attention import Attention as TimmAttention
from torch import Tensor, nn

from export.graph.attention import (
    AttentionForm,
    GlobalAttention,
    PathologyAttention,
    WindowAttention,
)

DIM, HEADS = 24, 3
FORMS = [
    AttentionForm(max_queries=None),
    AttentionForm(positions="extended", max_queries=None),
    AttentionForm(max_queries=15),
    AttentionForm(positions="extended", max_queries=15),
    AttentionForm(operator=True),
    AttentionForm(max_queries=None, fused=True),
]


@pytest.fixture(autouse=True)
def _without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def sam_attention(side: int) -> Attention:
    return randomised(Attention(DIM, HEADS, use_rel_pos=True, input_size=(side, side)))


def randomised(module: nn.Module) -> nn.Module:
    """Large weights, biases and positions, so that a wrong one shows."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def sam_windows(attention: Attention, tokens: Tensor, side: int, window: int) -> Tensor:
    """SAM's own way: zeros around the normalised tokens, then attention in each window."""
    windows, padded = window_partition(tokens.unflatten(1, (side, side)), window)
    return window_unpartition(attention(windows), window, padded, (side, side)).flatten(1, 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("side", "window"), [(8, 4), (7, 4), (3, 4), (5, 3)])
def test_windows_attend_as_sams_do_with_and_without_padding(
    form: AttentionForm, side: int, window: int
):
    attention, tokens = sam_attention(window), torch.randn(2, side**2, DIM)
    exported = WindowAttention(attention, side, window, form)(tokens)
    expected = sam_windows(attention, tokens, side, window)
    torch.testing.assert_close(exported, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_global_blocks_attend_as_sams_do(form: AttentionForm):
    side = 7
    attention, tokens = sam_attention(side), torch.randn(2, side**2, DIM)
    expected = attention(tokens.unflatten(1, (side, side))).flatten(1, 2)
    exported = GlobalAttention(attention, side, form)(tokens)
    torch.testing.assert_close(exported, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_the_pathology_encoder_attends_as_timm_does(form: AttentionForm, qkv_bias: bool):
    attention = randomised(TimmAttention(DIM, HEADS, qkv_bias=qkv_bias))
    tokens = torch.randn(2, 33, DIM)
    exported = PathologyAttention(attention, form)(tokens)
    torch.testing.assert_close(exported, attention(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"qk_norm": True}, {"scale_norm": True}, {"gated": True}])
def test_an_attention_with_options_is_not_taken_for_the_plain_one(options: dict[str, bool]):
    plain, other = (
        TimmAttention(DIM, HEADS, norm_layer=nn.LayerNorm, **chosen) for chosen in ({}, options)
    )
    assert PathologyAttention.fits(plain)
    assert not PathologyAttention.fits(other)


def test_no_padded_token_is_projected():
    side, window = 5, 4
    attention = WindowAttention(sam_attention(window), side, window, AttentionForm())
    seen: list[int] = []
    for projection in (attention.query, attention.key, attention.value, attention.output):
        projection.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    attention(torch.randn(1, side**2, DIM))
    assert seen == [side**2] * 4


@pytest.mark.parametrize("side", [4, 7, 14])
def test_extended_heads_have_a_width_that_fused_attention_takes(side: int):
    attention = GlobalAttention(sam_attention(side), side, AttentionForm(positions="extended"))
    assert attention.one_hot.shape[-1] % 8 == 0


def test_only_extended_positions_keep_the_rows_and_columns_of_the_keys():
    for positions in ("dense", "extended"):
        form = AttentionForm(positions=positions)
        names = dict(GlobalAttention(sam_attention(4), 4, form).named_buffers())
        assert ("one_hot" in names) is (positions == "extended")


def test_queries_are_cut_into_no_more_than_allowed():
    form = AttentionForm(max_queries=1024)
    assert [form.num_chunks(count) for count in (256, 1024, 1025, 4096)] == [1, 1, 2, 4]
    assert AttentionForm(max_queries=None).num_chunks(4097) == 1
