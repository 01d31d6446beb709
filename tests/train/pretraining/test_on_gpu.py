"""Pretraining on a GPU, held against the CPU."""

import csv
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support.gpu import DEVICE, needs_gpu, no_gpu
from tests.support.tiny_pretraining import tiny_pretraining
from train.pretraining.colors import change_colors
from train.pretraining.losses import (
    Centers,
    alignment_loss,
    context_loss,
    ibot_loss,
    koleo_loss,
    pooled_at,
)
from train.pretraining.run import pretrain
from train.pretraining.settings import PretrainSettings

pytestmark = needs_gpu

CPU = torch.device("cpu")
SAMPLES, PROTOTYPES, PATCHES, WIDTH = 6, 32, 16, 24


def settings_of(precision: str) -> PretrainSettings:
    """With every loss, and nothing dropped."""
    return tiny_pretraining(drop_path=0.0, precision=precision)


def rows_of(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-3), ("bf16-mixed", 0.05)])
def test_steps_of_all_losses_are_those_of_the_cpu(
    precision: str, tolerance: float, drawn_slides: Path, tmp_path: Path
):
    settings = settings_of(precision)
    for name, device in (("gpu", nullcontext()), ("cpu", no_gpu())):
        with device:
            pretrain(settings, drawn_slides, tmp_path / name)
    for found, expected in zip(rows_of(tmp_path / "gpu"), rows_of(tmp_path / "cpu"), strict=True):
        assert {"context", "alignment", "ibot", "spread"} <= found.keys()
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)
    weights = [
        load_file(tmp_path / name / "encoder" / "model.safetensors") for name in ("gpu", "cpu")
    ]
    for name, expected_weights in weights[1].items():
        # Adam's steps have the size of the learning rate, whatever the size of the gradient.
        torch.testing.assert_close(weights[0][name], expected_weights, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("start", ["gpu", "cpu"])
def test_a_run_goes_on_on_the_other_device(start: str, drawn_slides: Path, tmp_path: Path):
    devices = {"gpu": nullcontext, "cpu": no_gpu}
    half = settings_of("32-true")
    half = replace(half, schedule=replace(half.schedule, steps=2))
    whole = replace(half, schedule=replace(half.schedule, steps=4))
    (other,) = set(devices) - {start}
    with devices[start]():
        pretrain(half, drawn_slides, tmp_path / "half")
    before = torch.load(tmp_path / "half" / "last.ckpt", map_location="cpu", weights_only=True)
    with devices[other]():
        pretrain(half, drawn_slides, tmp_path / "half", resume=True)
        pretrain(whole, drawn_slides, tmp_path / "whole")
    after = torch.load(tmp_path / "half" / "last.ckpt", map_location="cpu", weights_only=True)
    assert all(torch.equal(before["state_dict"][n], v) for n, v in after["state_dict"].items())


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    scales = torch.tensor([0, 1, 2, 0, 1, 2])
    mask = torch.rand(SAMPLES, PATCHES) < 0.4
    mask[1] = False
    weights = torch.rand(SAMPLES, 2, 4, 4)
    return {
        "scales": scales,
        "mask": mask,
        "weights": weights / weights.sum(dim=(2, 3), keepdim=True),
        "logits": torch.rand(3, SAMPLES, PROTOTYPES) * 2 - 1,
        "teacher": torch.rand(2, SAMPLES, PROTOTYPES) * 2 - 1,
        "patches": torch.rand(SAMPLES, PATCHES, PROTOTYPES) * 2 - 1,
        "tokens": torch.randn(SAMPLES, PATCHES, WIDTH),
        "places": torch.rand(2, SAMPLES, 2, PROTOTYPES) * 2 - 1,
        "views": torch.randint(0, 256, (SAMPLES, 3, 48, 48), dtype=torch.uint8),
        "colors": torch.tensor([[1.2, 0.8, 1.0, 1.1, float(i % 2), i / 3] for i in range(SAMPLES)]),
    }


def terms(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every loss, with what it needs of the centres, and its gradients."""
    device = given["logits"].device
    logits, patches, tokens, places = (
        given[name].clone().requires_grad_() for name in ("logits", "patches", "tokens", "places")
    )
    centers = Centers(3, PROTOTYPES, 0.9).to(device)
    for found in given["teacher"]:
        centers.take(found, given["scales"])
    centers.move()
    targets = [centers.probabilities(t, given["scales"], 0.05) for t in given["teacher"]]
    pooled = pooled_at(tokens, given["weights"])
    details = places.detach()[0].softmax(dim=-1)
    losses = {
        "context": context_loss(targets, list(logits), 0.1),
        "alignment": alignment_loss(
            place_targets=places.detach().softmax(dim=-1),
            detail_logits=places[1],
            detail_targets=details,
            place_logits=places,
            temperature=0.1,
        ),
        "ibot": ibot_loss(given["patches"].softmax(dim=-1), patches, given["mask"], 0.1),
        "koleo": koleo_loss(pooled.flatten(0, 1)),
    }
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    leaves = {"logits": logits, "patches": patches, "tokens": tokens, "places": places}
    gradients = {f"gradient of {n}": t.grad for n, t in leaves.items() if t.grad is not None}
    assert len(gradients) == len(leaves)
    return {**losses, **gradients, "centers": centers.center}


def test_losses_and_gradients_are_those_of_the_cpu():
    given = inputs()
    expected = terms(given)
    found = terms({name: value.to(DEVICE) for name, value in given.items()})
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-4, atol=1e-6, msg=name)


def test_mixed_precision_changes_neither_colours_nor_neighbours():
    given = {name: value.to(DEVICE) for name, value in inputs().items()}
    close = given["tokens"].flatten(0, 1)
    close = torch.cat([close, close + 1e-3 * torch.randn_like(close)])
    plain = change_colors(given["views"], given["colors"]), koleo_loss(close)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        mixed = change_colors(given["views"], given["colors"]), koleo_loss(close)
    for found, expected in zip(mixed, plain, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)
