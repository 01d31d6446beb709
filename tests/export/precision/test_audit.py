import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.errors import InputError
from export.gate.tiles import ValidationTiles
from export.graph.attention import Projection
from export.precision.audit import Peak, audit_activations
from tests.support.errors import raises


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, values: Tensor) -> Tensor:
        return values * self.factor / self.factor


class Attention(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        queries = values.flatten(1, 2)[:, None]
        return F.scaled_dot_product_attention(queries, queries, queries)


class FunctionalNorm(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return F.layer_norm(values, (3,))


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.image_encoder = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})

    def forward(self, image: Tensor) -> Tensor:
        values = image.float()
        for block in self.image_encoder["blocks"]:
            values = block(values)
        return values


def _tiles(*brightness: int) -> ValidationTiles:
    images = np.stack([np.full((4, 4, 3), value, np.uint8) for value in brightness])
    names = tuple(f"tile_{value}" for value in brightness)
    return ValidationTiles(source="grey tiles", names=names, images=images, masks=None)


def test_a_block_that_grows_large_inside_is_named_with_its_tile() -> None:
    peaks = audit_activations(Model(Scale(1), Scale(100)), _tiles(10, 200, 50))
    assert peaks["image_encoder.blocks.1"] == Peak(20_000.0, "tile_200")
    assert peaks["image_encoder.blocks.0"].magnitude == 200.0


def test_negative_values_count_by_their_magnitude() -> None:
    peaks = audit_activations(Model(Scale(-100)), _tiles(10))
    assert peaks["image_encoder.blocks.0"].magnitude == 1_000.0


def test_the_logits_of_a_fused_attention_are_seen() -> None:
    peaks = audit_activations(Model(Attention()), _tiles(100))
    assert peaks["image_encoder.blocks.0"].magnitude == pytest.approx(3 * 100**2 / 3**0.5)


def test_weights_count() -> None:
    linear = nn.Linear(3, 3, bias=False)
    nn.init.constant_(linear.weight, -9_000.0)
    peaks = audit_activations(Model(linear), _tiles(0))
    assert peaks["image_encoder.blocks.0"].magnitude == 9_000.0


def test_folded_weights_count_where_they_are_buffers_of_the_exported_form() -> None:
    linear = nn.Linear(3, 3, bias=False)
    nn.init.constant_(linear.weight, -9_000.0)
    peaks = audit_activations(Model(Projection.of(linear)), _tiles(0))
    assert peaks["image_encoder.blocks.0"].magnitude == 9_000.0


def test_numbers_of_places_do_not_count() -> None:
    block = Scale(1)
    block.register_buffer("index", torch.tensor([1_000_000]))
    peaks = audit_activations(Model(block), _tiles(7))
    assert peaks["image_encoder.blocks.0"].magnitude == 7.0


@pytest.mark.parametrize("norm", [nn.LayerNorm(3), FunctionalNorm()])
def test_what_a_layer_norm_holds_inside_does_not_count(norm: nn.Module) -> None:
    # Of a constant tile it holds 1 / sqrt(eps) = 316.
    peaks = audit_activations(Model(norm), _tiles(7))
    assert peaks["image_encoder.blocks.0"].magnitude == 7.0


def test_nan_in_float32_is_refused() -> None:
    with raises(InputError, "image_encoder.blocks.0", "NaN", "tile_5"):
        audit_activations(Model(Scale(0)), _tiles(5))


def test_the_model_is_left_without_hooks() -> None:
    model = Model(Scale(1))
    audit_activations(model, _tiles(1))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    torch.testing.assert_close(model(torch.ones(1, 4, 4, 3)), torch.ones(1, 4, 4, 3))
