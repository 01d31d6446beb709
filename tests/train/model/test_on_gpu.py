"""The model on a GPU, held against the same model in float64 on the CPU."""

import copy

import pytest
import torch
from torch import Tensor

from tests.support.gpu import DEVICE, exact_float32, needs_gpu
from tests.support.toy_data import toy_settings
from train.model.class_bias import STRATEGIES, ClassStatistics
from train.model.segmenter import Segmenter
from train.settings import BiasSettings, ModelSettings

pytestmark = needs_gpu

NUM_CLASSES = 5
SHARES = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01])
DICE = torch.tensor([0.9, 0.8, 0.7, 0.5, 0.2])


def segmenter(strategy: str) -> Segmenter:
    """A model with random weights, whose class terms are far from zero."""
    torch.manual_seed(0)
    model = toy_settings().model
    values = {**vars(model), "bias": strategy, "tile_size_px": 128}
    built = Segmenter(ModelSettings(**values), NUM_CLASSES)
    bias = built.class_attention_bias
    initial = STRATEGIES[strategy].initial(BiasSettings(), ClassStatistics(SHARES, DICE))
    bias.start(initial, learned=STRATEGIES[strategy].learned)
    with torch.no_grad():
        for parameter in bias.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return built


def in_float64(model: Segmenter) -> Segmenter:
    model = copy.deepcopy(model).double()
    model.prompt_encoder.pe_layer.float()  # SAM's own code takes float32 alone
    return model


def results(model: Segmenter, features: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Masks and scores, and the gradients of all that the decoder's loss reaches."""
    output = model.decode(features)
    (output.low_res_logits.float() * weights).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.low_res_logits, "iou": output.iou_scores, **gradients}


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_masks_and_gradients_of_every_bias_are_those_of_float64(strategy: str):
    model = segmenter(strategy)
    features = torch.randn(2, model.num_features, 8, 8)
    weights = torch.randn(2, 1 + NUM_CLASSES, 32, 32)
    expected = results(in_float64(model), features.double(), weights.double())
    with exact_float32():
        there = copy.deepcopy(model).to(DEVICE)
        found = results(there, features.to(DEVICE), weights.to(DEVICE))
    assert found.keys() == expected.keys()
    if STRATEGIES[strategy].learned:
        assert "class_attention_bias.delta" in found
    for name, wanted in expected.items():
        error = (found[name].cpu().double() - wanted).norm()
        assert error <= 1e-3 * wanted.norm() + 1e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masks_in_16_bits_are_near_those_of_float64(dtype: torch.dtype):
    model = segmenter("dfa").eval()
    features = torch.randn(2, model.num_features, 8, 8)
    with torch.no_grad():
        expected = in_float64(model).decode(features.double()).low_res_logits
        with torch.autocast(DEVICE.type, dtype):
            found = model.to(DEVICE).decode(features.to(DEVICE)).low_res_logits
    error = (found.cpu().double() - expected).norm() / expected.norm()
    assert error < 5e-2


def test_features_of_both_encoders_are_those_of_float64():
    model = segmenter("dfa").eval()
    images = torch.randint(0, 256, (2, 3, 128, 128)).float()
    with torch.no_grad():
        expected = in_float64(model).encode(images.double())
        with exact_float32():
            found = model.to(DEVICE).encode(images.to(DEVICE))
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-3, atol=1e-3)
