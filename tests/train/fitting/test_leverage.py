from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support.toy_data import toy_settings
from train.data.dataset import WholeImageDataset
from train.data.folder import TileFolder, read_tile_folder
from train.data.pixels import class_frequencies
from train.fitting.evaluation import scale_of
from train.fitting.leverage import Leverage, attention_averaged, measure_leverage, print_leverage
from train.metrics import PooledConfusion, class_scores
from train.model.checkpoint import CheckpointCard
from train.model.class_bias import STRATEGIES, ClassStatistics
from train.model.segmenter import Segmenter, labels_from_logits

REMOVED, INVERTED, PRIOR = "bias removed", "bias inverted", "bias at its prior"
AVERAGED = "attention averaged over pixels"


@pytest.fixture(scope="module")
def folder(toy_data: Path) -> TileFolder:
    return read_tile_folder(toy_data)


def model(name: str, folder: TileFolder, gamma: float = 0.5) -> tuple[Segmenter, CheckpointCard]:
    """An untrained model whose bias is at its prior."""
    torch.manual_seed(0)
    settings = toy_settings(bias={"bias_gamma": gamma}, model={"bias": name, "mpp": folder.mpp})
    segmenter = Segmenter(settings.model, len(folder.classes))
    shares = class_frequencies(folder)
    prior = STRATEGIES[name].initial(settings.bias, ClassStatistics(shares))
    segmenter.class_attention_bias.start(prior, learned=STRATEGIES[name].learned)
    card = CheckpointCard(
        settings=settings,
        classes=folder.classes,
        mpp=folder.mpp,
        pixel_frequencies=tuple(shares.tolist()),
        class_attention_bias=tuple(prior.tolist()),
    )
    return segmenter, card


def measure(segmenter: Segmenter, card: CheckpointCard, folder: TileFolder) -> dict[str, Leverage]:
    return {entry.change: entry for entry in measure_leverage(segmenter, card, folder, "test")}


def test_a_bias_in_the_mask_logits_has_leverage_and_the_model_stays_as_it_was(folder: TileFolder):
    segmenter, card = model("dfa_masks", folder)
    with torch.no_grad():
        segmenter.class_attention_bias.delta[0] = 50.0
    before = {name: value.clone() for name, value in segmenter.state_dict().items()}
    found = measure(segmenter, card, folder)
    assert list(found) == ["as trained", REMOVED, INVERTED, PRIOR, AVERAGED]
    assert found["as trained"].labels_changed == 0
    for change in (REMOVED, INVERTED, PRIOR):
        # Everything was the first class, and now is not.
        assert found[change].labels_changed > 0.5
    after = segmenter.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("name", ["dfa", "dfa_masks"])
def test_a_bias_at_its_prior_changes_nothing_when_it_is_replaced_by_it(
    name: str, folder: TileFolder
):
    found = measure(*model(name, folder, gamma=50.0), folder)
    assert found[PRIOR].labels_changed == 0
    assert found[PRIOR].mean_dice == found["as trained"].mean_dice
    assert found[REMOVED].labels_changed > 0


def test_labelled_pixels_alone_count_as_changed_and_dice_is_that_of_each_change(folder: TileFolder):
    segmenter, card = model("dfa_masks", folder)
    with torch.no_grad():
        segmenter.class_attention_bias.delta.zero_()
        segmenter.class_attention_bias.delta[0] = 50.0  # everything is the first class
    measured = measure(segmenter, card, folder)
    num_changed = num_labelled = 0
    with_bias, without = PooledConfusion(5), PooledConfusion(5)
    with torch.no_grad():
        segmenter.class_attention_bias.delta.zero_()
        for image in WholeImageDataset(folder.tiles["test"], 5, scale_of(card)):
            logits = segmenter(image["tiles"].float()).low_res_logits
            predicted, labels = labels_from_logits(logits, 64), image["tile_labels"].long()
            num_changed += int(((predicted != 1) & (labels > 0)).sum())
            num_labelled += int((labels > 0).sum())
            with_bias.update(torch.ones_like(predicted), labels)
            without.update(predicted, labels)
    assert measured[REMOVED].labels_changed == pytest.approx(num_changed / num_labelled)
    trained, removed = (class_scores(confusion.compute()) for confusion in (with_bias, without))
    found = measured["as trained"].mean_dice, measured[REMOVED].mean_dice
    assert found == pytest.approx((trained.mean_dice, removed.mean_dice))
    assert trained.mean_dice != pytest.approx(removed.mean_dice)
    changes = (removed.dice - trained.dice).tolist()
    assert measured[REMOVED].dice_changes == pytest.approx(changes, nan_ok=True)


def test_a_temperature_is_a_part_of_the_bias_and_starts_at_1(folder: TileFolder):
    segmenter, card = model("dfa_temperature", folder)
    plain = measure(segmenter, card, folder)["as trained"].mean_dice
    with torch.no_grad():
        segmenter.class_attention_bias.log_temperature.copy_(torch.tensor([9.0, 0, -9, 9, -9]))
    found = measure(segmenter, card, folder)
    assert found[PRIOR].labels_changed > 0
    assert found[PRIOR].mean_dice == plain
    with torch.no_grad():
        segmenter.class_attention_bias.delta.zero_()
    assert found.keys() == measure(segmenter, card, folder).keys()


def test_images_without_a_label_and_a_model_of_unknown_frequencies_are_measured(
    folder: TileFolder, data_copy: Path
):
    segmenter, card = model("dfa", folder)
    for tile in folder.tiles["test"]:
        path = data_copy / "mask" / tile.mask.name
        with Image.open(path) as mask:
            blank = Image.new(mask.mode, mask.size)
        blank.save(path)
    unlabelled = read_tile_folder(data_copy)
    found = measure(segmenter, replace(card, pixel_frequencies=()), unlabelled)
    assert list(found) == ["as trained", REMOVED, INVERTED, AVERAGED]
    assert {entry.labels_changed for entry in found.values()} == {0}


def test_the_table_has_shares_and_what_dice_becomes(capsys: pytest.CaptureFixture[str]):
    trained = Leverage(change="as trained", labels_changed=0.0, mean_dice=0.75, dice_changes=(0.0,))
    print_leverage([trained, replace(trained, change=REMOVED, labels_changed=0.1, mean_dice=0.5)])
    rows = [line.strip(" │").split() for line in capsys.readouterr().out.splitlines()]
    assert ["as", "trained", "│", "0.00%", "│", "0.7500"] in rows
    assert ["bias", "removed", "│", "10.00%", "│", "0.5000", "(-0.2500)"] in rows


def test_a_model_without_a_bias_tells_of_the_attention_alone(folder: TileFolder):
    segmenter, card = model("none", folder)
    assert list(measure(segmenter, card, folder)) == ["as trained", AVERAGED]
    attention = segmenter.mask_decoder.transformer.layers[1].cross_attn_image_to_token
    pixels, tokens = torch.randn(1, 9, 32), torch.randn(1, 8, 32)
    trained = attention(pixels, tokens, tokens)
    with attention_averaged(segmenter):
        averaged = attention(pixels, tokens, tokens)
    torch.testing.assert_close(averaged, trained.mean(dim=1, keepdim=True).expand_as(trained))
    torch.testing.assert_close(attention(pixels, tokens, tokens), trained)
