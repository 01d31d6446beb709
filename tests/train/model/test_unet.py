"""The U-Net that comparisons have beside the paper's model: trained and scored by the same code."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from export.bundle import write_bundle
from export.errors import GraphError
from export.settings import BundleSettings
from tests.support.errors import raises
from tests.support.toy_data import TILE_SIZE_PX, changed, one_image, toy_settings
from train.comparison.methods import UNET
from train.data.folder import read_tile_folder
from train.errors import CheckpointError, SettingsError
from train.fitting.evaluation import predict_split
from train.fitting.leverage import measure_leverage
from train.fitting.run import fit
from train.fitting.scores import evaluate
from train.model.build import build_segmenter
from train.model.checkpoint import load_checkpoint, read_card
from train.model.previous_run import settings_after

SETTINGS = UNET.settings(toy_settings(), 0)


@pytest.fixture(scope="module")
def unet_run(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unet") / "run"
    fit(SETTINGS, toy_data, run)
    return run


@pytest.mark.slow
def test_a_unet_learns_and_its_checkpoint_scores_as_the_run_says(unet_run: Path, toy_data: Path):
    card = read_card(unet_run)
    scores = evaluate(*load_checkpoint(unet_run), toy_data, "validation")
    assert scores["dice/mean"] == pytest.approx(card.metrics["dice/mean"], abs=1e-5)
    untrained = build_segmenter(SETTINGS.model, len(card.classes)).eval()
    assert scores["dice/mean"] > evaluate(untrained, card, toy_data, "validation")["dice/mean"]


def test_its_masks_have_the_tiles_resolution_and_blend_to_the_same_labels(
    unet_run: Path, toy_data: Path, tmp_path: Path
):
    segmenter, card = load_checkpoint(unet_run)
    image = np.array(Image.open(toy_data / "img" / "tile0.png"))
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    with torch.inference_mode():
        logits = segmenter(pixels).low_res_logits
    assert logits.shape[-2:] == (TILE_SIZE_PX, TILE_SIZE_PX)
    expected = logits[0, 1:].argmax(dim=0) + 1
    assert (predict(segmenter, card, image, tmp_path / "one", card.mpp) == expected).all()
    # The same tissue in a mirror: several tiles, so blended from probabilities.
    mirrored = np.concatenate([image, image[:, ::-1]], axis=1)
    found = predict(segmenter, card, mirrored, tmp_path / "two", card.mpp)
    assert found.shape == (TILE_SIZE_PX, 2 * TILE_SIZE_PX)
    assert (found[:, : TILE_SIZE_PX // 2] == expected[:, : TILE_SIZE_PX // 2]).float().mean() > 0.9


def predict(segmenter, card, image: np.ndarray, root: Path, mpp: float) -> torch.Tensor:
    (found,) = predict_split(segmenter, card, one_image(root, image, mpp), "test", tta=False)
    return found.predicted


def test_it_has_neither_a_bias_nor_an_attention_to_take_away(unet_run: Path, toy_data: Path):
    found = measure_leverage(*load_checkpoint(unet_run), read_tile_folder(toy_data), "test")
    assert [entry.change for entry in found] == ["as trained"]


def test_it_is_neither_exported_nor_gone_on_from(unet_run: Path, tmp_path: Path):
    with raises(GraphError, "unet"):
        write_bundle(unet_run, tmp_path / "bundle", BundleSettings())
    assert not (tmp_path / "bundle").exists()
    with raises(CheckpointError, "unet", "--resume"):
        settings_after(toy_settings(), unet_run)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"bias": "dfa"}, ("--bias dfa", "none")), ({"encoders_frozen": True}, ("encoders_frozen",))],
    ids=["bias", "frozen"],
)
def test_what_it_does_not_have_is_refused(changes: dict[str, object], named: tuple[str, ...]):
    with raises(SettingsError, *named):
        build_segmenter(changed(SETTINGS, model=changes).model, 3)


def test_training_one_that_is_meant_to_be_exported_is_refused_before_it_starts(
    toy_data: Path, tmp_path: Path
):
    settings = changed(SETTINGS, runtime={"exportable": True})
    with raises(SettingsError, "unet", "--no-exportable"):
        fit(settings, toy_data, tmp_path / "run")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "monai.networks.nets.unet", None)
    with raises(SettingsError, "'.[compare]'"):
        build_segmenter(SETTINGS.model, 3)
