from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.errors import raises
from tests.support.toy_data import changed, toy_settings
from train.errors import CheckpointError
from train.model import checkpoint, previous_run
from train.model.checkpoint import (
    CheckpointCard,
    WeightsOrigin,
    load_checkpoint,
    read_card,
    read_checkpoint,
)
from train.model.previous_run import EarlierRun, load_run, settings_after
from train.model.segmenter import Segmenter
from train.presets import bcss, synthetic
from train.settings import BiasName

EarlierCard = Callable[..., CheckpointCard]


@pytest.fixture
def earlier(toy_run: Path, monkeypatch: pytest.MonkeyPatch) -> EarlierCard:
    """Changes the card of the earlier run, and gives it."""

    def change(**changes: object) -> CheckpointCard:
        card: CheckpointCard = replace(read_card(toy_run), **changes)  # type: ignore[arg-type]
        for module in (checkpoint, previous_run):
            monkeypatch.setattr(module, "read_card", lambda _: card)
        return card

    return change


def test_a_run_goes_on_with_the_weights_of_another(toy_run: Path):
    card = read_card(toy_run)
    segmenter = Segmenter(settings_after(toy_settings(), toy_run).model, len(card.classes))
    origins, left_out = load_run(segmenter, toy_run, card.classes)
    earlier, _ = load_checkpoint(toy_run)
    image = torch.rand(1, 3, 64, 64) * 255
    with torch.inference_mode():
        assert torch.equal(segmenter.eval()(image).low_res_logits, earlier(image).low_res_logits)
    assert not left_out
    assert origins[0].sha256 == card.weights_sha256


def test_a_run_has_the_architecture_of_the_one_that_it_goes_on_from(toy_run: Path):
    settings = settings_after(bcss(), toy_run)
    earlier = read_card(toy_run).settings.model
    assert settings.model.image_encoder == earlier.image_encoder == "tiny"
    assert settings.model.decoder_dim == earlier.decoder_dim
    assert settings.model.tile_size_px == bcss().model.tile_size_px


def test_everything_that_describes_weights_is_taken_and_what_does_not_is_asked_for(
    toy_run: Path, earlier: EarlierCard
):
    described = {
        "image_encoder": "tiny_conv",
        "pathology_encoder": "vit_small_patch14_dinov2",
        "pathology_args": {"reg_tokens": 4},
        "pathology_encoder_depth": 3,
        "pathology_layer_scale": True,
        "pathology_mean": (0.1, 0.2, 0.3),
        "pathology_std": (0.4, 0.5, 0.6),
        "pathology_positions": "dino",
        "decoder_dim": 48,
    }
    earlier(settings=toy_settings(model={**described, "mpp": 0.25}))
    model = settings_after(synthetic(), toy_run).model
    assert described.items() <= vars(model).items()
    assert model.mpp == 0.25
    assert settings_after(changed(synthetic(), model={"mpp": 0.5}), toy_run).model.mpp == 0.5


def test_positions_are_resized_to_a_larger_tile_in_the_encoders_way(toy_run: Path):
    card = read_card(toy_run)
    positions = []
    for way in ("timm", "dino"):
        settings = toy_settings(model={"tile_size_px": 96, "pathology_positions": way})
        segmenter = Segmenter(settings.model, len(card.classes)).eval()
        _, left_out = load_run(segmenter, toy_run, card.classes)
        assert not left_out
        positions.append(segmenter.pathology_encoder.vit.pos_embed)
    assert positions[0].shape == positions[1].shape
    assert not torch.equal(*positions)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"decoder_dim": 64}, ("(32,)", "(64,)")),
        ({"pathology_encoder_depth": 2}, ("blocks.1", "missing")),
    ],
)
def test_weights_of_another_shape_or_number_are_refused(
    toy_run: Path, other: dict[str, int], named: tuple[str, ...]
):
    card = read_card(toy_run)
    segmenter = Segmenter(toy_settings(model=other).model, len(card.classes))
    with raises(CheckpointError, toy_run, *named):
        load_run(segmenter, toy_run, card.classes)


def test_what_the_earlier_run_started_from_is_still_told(toy_run: Path, earlier: EarlierCard):
    origin = WeightsOrigin(part="pathology encoder", name="HIPT", file="vit.pth", licence="its own")
    card = earlier(origins=(origin,))
    segmenter = Segmenter(toy_settings().model, len(card.classes))
    origins, _ = load_run(segmenter, toy_run, card.classes)
    assert origins[1:] == (origin,)


@pytest.mark.parametrize("bias", ["dfa", "dfa_heads", "dfa_temperature"])
def test_a_bias_of_another_kind_or_that_was_none_keeps_its_start(
    bias: str, toy_run: Path, earlier: EarlierCard
):
    card = read_card(toy_run)
    if bias == "dfa":
        card = earlier(class_attention_bias=(0.0,) * len(card.classes))
    segmenter = Segmenter(toy_settings(model={"bias": bias}).model, len(card.classes))
    segmenter.class_attention_bias.start(torch.full((5,), 7.0), learned=True)
    _, left_out = load_run(segmenter, toy_run, card.classes)
    assert (segmenter.class_attention_bias.delta == 7).all()
    assert [name.partition(":")[0] for name in left_out] == ["class_attention_bias.delta"]


def test_a_bias_that_the_new_run_freezes_keeps_its_start(toy_run: Path):
    card = read_card(toy_run)
    segmenter = Segmenter(toy_settings().model, len(card.classes))
    segmenter.class_attention_bias.start(torch.full((5,), 7.0), learned=False)
    assert load_run(segmenter, toy_run, card.classes)[1]
    assert (segmenter.class_attention_bias.delta == 7).all()


def test_the_temperature_of_an_earlier_run_is_left_out_of_a_plain_bias(
    toy_run: Path, monkeypatch: pytest.MonkeyPatch
):
    card, weights = read_checkpoint(toy_run)
    weights["class_attention_bias.log_temperature"] = torch.ones(5)
    monkeypatch.setattr(previous_run, "read_checkpoint", lambda _: (card, weights))
    segmenter = Segmenter(toy_settings().model, len(card.classes))
    _, left_out = load_run(segmenter, toy_run, card.classes)
    assert [name.partition(":")[0].rpartition(".")[2] for name in left_out] == [
        "delta",
        "log_temperature",
    ]


def test_a_bias_that_was_not_learned_starts_anew_and_is_told(
    toy_run: Path, capsys: pytest.CaptureFixture[str]
):
    card = read_card(toy_run)
    settings = toy_settings(model={"bias": BiasName("none")})
    segmenter = Segmenter(settings.model, len(card.classes))
    assert card.weights_sha256 is not None
    EarlierRun(settings, toy_run, card.weights_sha256).load_into(segmenter, card.classes)
    assert not segmenter.class_attention_bias.delta.any()
    (told,) = capsys.readouterr().out.splitlines()
    assert told.startswith(f"not taken from {toy_run}: class_attention_bias.delta: ")


def test_a_run_that_has_other_weights_by_now_is_not_gone_on_from(toy_run: Path):
    card = read_card(toy_run)
    segmenter = Segmenter(toy_settings().model, len(card.classes))
    with raises(CheckpointError, toy_run, "other weights now"):
        EarlierRun(toy_settings(), toy_run, "0" * 64).load_into(segmenter, card.classes)


def test_another_architecture_that_was_asked_for_is_refused(toy_run: Path):
    with raises(CheckpointError, "decoder_dim 32", "--decoder-dim is 64"):
        settings_after(changed(bcss(), model={"decoder_dim": 64}), toy_run)


def test_other_classes_are_refused(toy_run: Path):
    card = read_card(toy_run)
    segmenter = Segmenter(toy_settings().model, len(card.classes))
    with raises(CheckpointError, card.classes[0].name):
        load_run(segmenter, toy_run, tuple(reversed(card.classes)))


def test_a_run_that_is_not_there_is_refused(tmp_path: Path):
    with raises(CheckpointError, "model.json"):
        settings_after(toy_settings(), tmp_path)
