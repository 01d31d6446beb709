import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from train.errors import FocalPathError
from train.model.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture
def run(toy_run: Path, tmp_path: Path) -> Path:
    """A copy of the toy run that a test may damage."""
    return Path(shutil.copytree(toy_run, tmp_path / "run"))


def test_a_saved_model_answers_the_same_after_loading(toy_run: Path, tmp_path: Path):
    segmenter, card = load_checkpoint(toy_run)
    path = save_checkpoint(tmp_path / "copy", segmenter, card)
    again, same_card = load_checkpoint(path)
    image = torch.rand(1, 3, 64, 64) * 255
    with torch.inference_mode():
        assert torch.equal(segmenter(image).low_res_logits, again(image).low_res_logits)
    assert same_card == card


def test_the_card_names_the_learned_bias_that_the_weights_hold(toy_run: Path):
    segmenter, card = load_checkpoint(toy_run)
    held = segmenter.class_attention_bias.delta.tolist()
    assert list(card.class_attention_bias) == pytest.approx(held, abs=1e-6)


def remove_card(run: Path) -> None:
    (run / "model.json").unlink()


def truncate_weights(run: Path) -> None:
    path = run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def add_a_setting(run: Path) -> None:
    edit_card(run, lambda card: card.update(shoe_size=43))


def widen_decoder(run: Path) -> None:
    edit_card(run, lambda card: card["settings"]["model"].update(decoder_dim=64))


def remove_a_weight(run: Path) -> None:
    weights = load_file(run / "model.safetensors")
    del weights["mask_decoder.iou_token.weight"]
    save_file(weights, run / "model.safetensors")


def edit_card(run: Path, edit: Callable[[dict], None]) -> None:
    card = json.loads((run / "model.json").read_text())
    edit(card)
    (run / "model.json").write_text(json.dumps(card))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_card, "model.json does not exist"),
        (truncate_weights, "not a readable safetensors file"),
        (add_a_setting, "shoe_size"),
        (widen_decoder, r"neck.0.weight is \(32, 320, 1, 1\), expected \(64, 320, 1, 1\)"),
        (remove_a_weight, "mask_decoder.iou_token.weight is missing"),
    ],
)
def test_a_checkpoint_that_is_wrong_is_refused(
    run: Path, damage: Callable[[Path], None], message: str
):
    damage(run)
    with pytest.raises(FocalPathError, match=message):
        load_checkpoint(run)
