"""Whole images, predicted in training as the service answers them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from serve.inference.segmenter import open_segmenter
from serve.settings import ServeSettings
from tests.support.pictures import blobs
from tests.support.toy_data import one_image
from train.data.dataset import WholeImageDataset
from train.data.scale import TileScale
from train.fitting.evaluation import label_images, predict_split
from train.fitting.scores import evaluate
from train.model.checkpoint import load_checkpoint, read_card
from train.model.segmenter import SegmenterOutput


@pytest.mark.slow
@pytest.mark.parametrize(
    ("height", "width", "mpp"),
    [(64, 64, 0.5), (40, 64, 0.5), (150, 97, 0.5), (200, 131, 0.25), (50, 30, 1.1)],
)
def test_the_labels_are_those_of_the_served_model(
    height: int, width: int, mpp: float, toy_run: Path, exported_bundle: Path, tmp_path: Path
):
    image = blobs(height, width)
    folder = one_image(tmp_path, image, mpp)
    (found,) = predict_split(*load_checkpoint(toy_run), folder, "test", tta=False)
    with open_segmenter(ServeSettings(bundle=exported_bundle, threads=1)) as segmenter:
        served = segmenter.segment(image, mpp=mpp).labels
    assert found.predicted.shape == (height, width)
    assert (found.predicted.numpy() == served).mean() > 0.998


@pytest.mark.slow
def test_averaging_over_views_makes_the_answer_turn_with_the_image(toy_run: Path, tmp_path: Path):
    image = blobs(64, 64)
    model = load_checkpoint(toy_run)
    answers = []
    for index, pixels in enumerate((image, np.rot90(image))):
        folder = one_image(tmp_path / str(index), np.ascontiguousarray(pixels), 0.5)
        (found,) = predict_split(*model, folder, "test", tta=True)
        answers.append(found.predicted)
    turned = torch.rot90(answers[0], 1, dims=(0, 1))
    assert (turned == answers[1]).float().mean() > 0.995


def test_views_of_a_model_that_turns_with_its_image_average_to_its_answer(tmp_path: Path):
    """In values, too: a sum over the views, or one turned back wrongly, is seen."""
    image = np.random.default_rng(0).integers(0, 256, (150, 97, 3), np.uint8)
    folder = one_image(tmp_path, image, 0.5)
    whole = WholeImageDataset(folder.tiles["test"], 3, TileScale(tile_size_px=64, mpp=0.5))[0]

    def segment(batch: Mapping[str, torch.Tensor]) -> SegmenterOutput:
        logits = avg_pool2d(batch["image"].float(), 4)
        unlabelled = torch.zeros_like(logits[:, :1])
        return SegmenterOutput(torch.cat([unlabelled, logits], dim=1), torch.zeros(0))

    plain, averaged = (label_images(segment, [whole], 4, tta=tta)[0] for tta in (False, True))
    assert (plain == averaged).float().mean() > 0.999
    assert len(plain.unique()) == 3


@pytest.fixture
def old_run(run_copy: Path) -> Path:
    """The toy run as version 0.1 described it, scored at twice the tile's size."""
    card = json.loads((run_copy / "model.json").read_text())
    model = card["settings"]["model"]
    del model["mpp"], model["squeeze"]
    model["score_size_px"] = 2 * model["tile_size_px"]
    (run_copy / "model.json").write_text(json.dumps(card))
    return run_copy


def test_an_old_checkpoint_says_the_scale_that_its_network_saw(old_run: Path):
    card = read_card(old_run)
    assert card.mpp == card.settings.model.mpp == 1.0
    assert card.settings.model.squeeze


def test_an_old_checkpoint_squeezes_images_as_it_did_and_says_so(
    old_run: Path, toy_run: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    evaluate(*load_checkpoint(old_run), toy_data, "test")
    assert "version 0.1, which squeezed" in " ".join(capsys.readouterr().out.split())
    image = blobs(64, 64)
    double = np.asarray(Image.fromarray(image).resize((128, 64), Image.Resampling.NEAREST))
    plain = one_image(tmp_path / "plain", image, 0.5)
    oblong = one_image(tmp_path / "double", double, 0.5)
    (expected,) = predict_split(*load_checkpoint(toy_run), plain, "test", tta=False)
    agreement = []
    for run in (old_run, toy_run):
        (found,) = predict_split(*load_checkpoint(run), oblong, "test", tta=False)
        assert found.predicted.shape == (64, 128)
        agreement.append((found.predicted[:, ::2] == expected.predicted).float().mean())
    assert agreement[0] > 0.85 > agreement[1]
