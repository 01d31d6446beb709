from pathlib import Path

import pytest
import torch

from tests.support.errors import raises
from tests.support.toy_data import changed, toy_settings
from train.errors import CheckpointError
from train.model.checkpoint import load_checkpoint, read_card
from train.model.previous_run import EarlierRun, load_run, settings_after
from train.model.segmenter import Segmenter
from train.presets import bcss
from train.settings import BiasName


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


def test_a_bias_that_was_not_learned_starts_anew_and_is_told(
    toy_run: Path, capsys: pytest.CaptureFixture[str]
):
    card = read_card(toy_run)
    settings = toy_settings(model={"bias": BiasName("none")})
    segmenter = Segmenter(settings.model, len(card.classes))
    EarlierRun(settings, toy_run).load_into(segmenter, card.classes)
    assert not segmenter.class_attention_bias.delta.any()
    (told,) = capsys.readouterr().out.splitlines()
    assert told.startswith(f"not taken from {toy_run}: class_attention_bias.delta: ")


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
