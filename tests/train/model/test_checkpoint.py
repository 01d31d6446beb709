import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.errors import raises
from tests.support.meanwhile import before_call
from train.errors import CheckpointError
from train.files import sha256_of
from train.model import checkpoint
from train.model.checkpoint import load_checkpoint, read_card, read_checkpoint, save_checkpoint


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


@pytest.mark.parametrize(
    ("resize", "resized_from_px"), [("antialiased", None), ("plain", 64 * 3 // 2)]
)
def test_cards_that_say_how_images_were_resized_still_load(
    resize: str, resized_from_px: int | None, run_copy: Path
):
    edit_card(run_copy, lambda card: _resize_as_once(card["settings"]["model"], resize))
    assert read_card(run_copy).settings.model.resized_from_px == resized_from_px


def _resize_as_once(model: dict[str, object], resize: str) -> None:
    del model["resized_from_px"]
    model["resize"] = resize


def remove_card(run: Path) -> None:
    (run / "model.json").unlink()


def truncate_weights(run: Path) -> None:
    path = run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def flip_a_bit(run: Path) -> None:
    path = run / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def put_in_a_nan(run: Path) -> None:
    weights = load_file(run / "model.safetensors")
    weights["neck.0.weight"][0] = torch.nan
    _write_weights_without_checksum(run, weights)


def edited(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda run: edit_card(run, edit)


def train_no_epochs(card: dict[str, Any]) -> None:
    card["settings"]["optimization"]["epochs"] = "many"


def widen_decoder(card: dict[str, Any]) -> None:
    card["settings"]["model"]["decoder_dim"] = 64


def remove_a_weight(run: Path) -> None:
    weights = load_file(run / "model.safetensors")
    del weights["mask_decoder.iou_token.weight"]
    _write_weights_without_checksum(run, weights)


def _write_weights_without_checksum(run: Path, weights: dict[str, torch.Tensor]) -> None:
    """As a checkpoint of an older version has none."""
    save_file(weights, run / "model.safetensors")
    edit_card(run, lambda card: card.pop("weights_sha256"))


def edit_card(run: Path, edit: Callable[[dict], None]) -> None:
    card = json.loads((run / "model.json").read_text())
    edit(card)
    (run / "model.json").write_text(json.dumps(card))


@pytest.mark.parametrize(
    ("damage", "values"),
    [
        (remove_card, ["model.json"]),
        (truncate_weights, ["model.safetensors", "not a readable safetensors"]),
        (flip_a_bit, ["model.safetensors", "SHA-256"]),
        (put_in_a_nan, ["neck.0.weight", "not finite"]),
        (edited(lambda card: card.update(shoe_size=43)), ["shoe_size is unknown"]),
        (
            edited(lambda card: card.pop("settings")),
            ["model.json", "settings is missing", "Train again"],
        ),
        (edited(lambda card: card.update(mpp=3.0)), ["mpp is 3.0", "settings.model.mpp 0.5"]),
        (edited(lambda card: card.update(mpp=None)), ["mpp is None", "settings.model.mpp 0.5"]),
        (edited(lambda card: card["class_attention_bias"].pop()), ["class_attention_bias"]),
        (edited(lambda card: card["class_attention_bias"].append(0)), ["class_attention_bias"]),
        (
            edited(lambda card: card.update(class_attention_bias=[math.nan] * 5)),
            ["class_attention_bias", "nan", "finite"],
        ),
        (edited(lambda card: card["pixel_frequencies"].pop()), ["pixel_frequencies"]),
        (edited(lambda card: card["classes"][1].update(name="Tumor")), ["4 different"]),
        (edited(lambda card: card["classes"][1].update(name="")), ["class ''"]),
        (edited(lambda card: card["classes"][1].update(name="a\nb")), ["class 'a\\nb'"]),
        (edited(lambda card: card["classes"][1].update(color="red")), ["'red'", "#rrggbb"]),
        (edited(train_no_epochs), ["optimization.epochs is 'many'; expected a whole number"]),
        (edited(widen_decoder), ["neck.0.weight", "(32, 320, 1, 1)", "(64, 320, 1, 1)"]),
        (remove_a_weight, ["mask_decoder.iou_token.weight", "missing"]),
    ],
)
def test_a_checkpoint_that_is_wrong_is_refused(
    run_copy: Path, damage: Callable[[Path], None], values: list[str]
):
    damage(run_copy)
    with raises(CheckpointError, *values):
        load_checkpoint(run_copy)


def test_a_checkpoint_of_an_older_version_without_checksum_loads(run_copy: Path):
    _write_weights_without_checksum(run_copy, load_file(run_copy / "model.safetensors"))
    assert read_card(run_copy).weights_sha256 is None
    assert load_checkpoint(run_copy)[1].weights_sha256 == sha256_of(run_copy / "model.safetensors")


@pytest.fixture
def train_on(run_copy: Path) -> Callable[[], None]:
    """Replaces the checkpoint of the run by that of a later epoch, once."""
    segmenter, card = load_checkpoint(run_copy)
    with torch.no_grad():
        for value in segmenter.parameters():
            value += 1
    later = replace(card, metrics={"dice/mean": 0.99}, class_attention_bias=(7.0,) * 5)
    epochs = iter([later])

    def save() -> None:
        for epoch in epochs:
            save_checkpoint(run_copy, segmenter, epoch)

    return save


@pytest.mark.parametrize("place", ["read_card", "sha256_of", "load_file"])
def test_card_and_weights_are_of_one_epoch_also_where_the_training_goes_on(
    run_copy: Path, train_on: Callable[[], None], monkeypatch: pytest.MonkeyPatch, place: str
):
    before_call(monkeypatch, checkpoint, place, train_on)
    card, weights = read_checkpoint(run_copy)
    assert card == read_card(run_copy)
    assert card.metrics == {"dice/mean": 0.99}
    later = load_file(run_copy / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in later.items())


def test_a_checkpoint_of_which_one_file_is_replaced_already_is_waited_for(
    run_copy: Path, train_on: Callable[[], None], monkeypatch: pytest.MonkeyPatch
):
    weights = run_copy / "model.safetensors"
    earlier = weights.read_bytes()
    train_on()
    later = run_copy / "later"
    weights.rename(later)
    weights.write_bytes(earlier)
    before_call(monkeypatch, checkpoint, "load_file", lambda: later.replace(weights))
    assert load_checkpoint(run_copy)[1] == read_card(run_copy)


def test_other_files_of_a_run_may_change_while_its_checkpoint_is_read(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch
):
    numbers = iter(range(9))

    def load_while_metrics_grow(path: Path) -> dict[str, torch.Tensor]:
        (run_copy / f"metrics-{next(numbers)}").touch()
        return load_file(path)

    monkeypatch.setattr(checkpoint, "load_file", load_while_metrics_grow)
    assert load_checkpoint(run_copy)[1] == read_card(run_copy)
    assert next(numbers) == 1


def test_a_checkpoint_that_is_written_again_and_again_is_told_as_that(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch
):
    weights = run_copy / "model.safetensors"

    def replace_and_load(path: Path) -> dict[str, torch.Tensor]:
        shutil.copy(weights, run_copy / "same")
        (run_copy / "same").replace(weights)
        return load_file(path)

    monkeypatch.setattr(checkpoint, "load_file", replace_and_load)
    with raises(CheckpointError, run_copy, "changes again and again"):
        load_checkpoint(run_copy)


def test_an_iou_head_whose_error_had_no_weight_counts_as_untrained(toy_run: Path):
    card = load_checkpoint(toy_run)[1]
    assert card.iou_head_trained
    loss = replace(card.settings.loss, iou_weight=0.0)
    assert not replace(card, settings=replace(card.settings, loss=loss)).iou_head_trained
