from typing import cast

import pytest
import torch
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor, nn

from tests.support.gpu import DEVICE, ON_GPU, exact_float32, needs_gpu
from train.model.image_attention import ImageAttention, fused_attention
from train.model.image_encoder import build_image_encoder


def attention(height: int, width: int, *, dim: int = 32, num_heads: int = 4) -> Attention:
    """SAM's attention with random weights, in float64."""
    torch.manual_seed(0)
    module = Attention(dim, num_heads=num_heads, use_rel_pos=True, input_size=(height, width))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return cast(Attention, module.double())


def results(attend: nn.Module | None, module: Attention, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of all weights."""
    x = x.detach().requires_grad_()
    output = fused_attention(module, x) if attend is None else attend(x)
    weights = list(module.parameters())
    return [
        output.detach(),
        *torch.autograd.grad((output * output.detach().sin()).sum(), [x, *weights]),
    ]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 7)])
def test_fused_attention_and_its_gradients_are_those_of_sam(height: int, width: int):
    module = attention(height, width)
    x = torch.randn(2, height, width, 32, dtype=torch.float64)
    for found, expected in zip(results(None, module, x), results(module, module, x), strict=True):
        torch.testing.assert_close(found, expected)


def test_every_block_of_the_encoder_has_it_under_the_names_of_sams_weights():
    encoder = build_image_encoder("tiny", 64)
    attentions = [module for module in encoder.modules() if isinstance(module, Attention)]
    assert attentions
    assert all(type(module) is ImageAttention for module in attentions)
    assert {"rel_pos_h", "qkv.weight", "proj.bias"} <= attentions[0].state_dict().keys()


class TestOnGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize(("side", "num_heads"), [(14, 4), (64, 1)], ids=["window", "tile"])
    def test_attention_and_its_gradients_are_those_of_float64(self, side: int, num_heads: int):
        module, x, expected = case(side, num_heads)
        there = attention(side, side, dim=64, num_heads=num_heads).to(DEVICE, torch.float32)
        there.__class__ = ImageAttention
        with exact_float32():
            found = results(there if ON_GPU else None, there, x.to(DEVICE, torch.float32))
        assert max(errors(found, expected)) < 2e-4

    @pytest.mark.parametrize(("side", "num_heads"), [(14, 4), (64, 1)], ids=["window", "tile"])
    def test_in_bfloat16_it_is_as_near_to_float64_as_sams(self, side: int, num_heads: int):
        module, x, expected = case(side, num_heads)
        there = attention(side, side, dim=64, num_heads=num_heads).to(DEVICE, torch.bfloat16)
        x = x.to(DEVICE, torch.bfloat16)
        sams = errors(results(there, there, x), expected)
        ours = errors(results(None, there, x), expected)
        assert all(error < 1.5 * of_sam + 1e-3 for error, of_sam in zip(ours, sams, strict=True))


def case(side: int, num_heads: int) -> tuple[Attention, Tensor, list[Tensor]]:
    """An attention, an input, and their results, in float64 on the CPU."""
    module = attention(side, side, dim=64, num_heads=num_heads)
    x = torch.randn(1, side, side, 64, dtype=torch.float64)
    return module, x, results(module, module, x)


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Relative, of each tensor."""
    pairs = zip(found, expected, strict=True)
    return [float((f.cpu().double() - wanted).norm() / wanted.norm()) for f, wanted in pairs]
