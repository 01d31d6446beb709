"""Whole images, predicted in training as the service answers them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from serve.inference.segmenter import open_segmenter
from serve.settings import ServeSettings
from tests.support.pictures import blobs
from train.data.folder import Tile, TileFolder
from train.fitting.evaluation import predict_split
from train.model.checkpoint import load_checkpoint


def folder_of(root: Path, image: NDArray[np.uint8], mpp: float) -> TileFolder:
    """A data set of one test image whose labels are all 1."""
    Image.fromarray(image).save(root / "image.png")
    Image.fromarray(np.ones(image.shape[:2], np.uint8)).save(root / "mask.png")
    tile = Tile("image", root / "image.png", root / "mask.png", mpp)
    return TileFolder(root, (), None, {"training": (), "validation": (), "test": (tile,)})


@pytest.mark.parametrize(
    ("height", "width", "mpp"),
    [(64, 64, 0.5), (40, 64, 0.5), (150, 97, 0.5), (200, 131, 0.25), (50, 30, 1.1)],
)
def test_the_labels_are_those_of_the_served_model(
    height: int, width: int, mpp: float, toy_run: Path, exported_bundle: Path, tmp_path: Path
):
    image = blobs(height, width)
    folder = folder_of(tmp_path, image, mpp)
    (found,) = predict_split(*load_checkpoint(toy_run), folder, "test", tta=False)
    with open_segmenter(ServeSettings(bundle=exported_bundle, threads=1)) as segmenter:
        served = segmenter.segment(image, mpp=mpp).labels
    assert found.predicted.shape == (height, width)
    assert (found.predicted.numpy() == served).mean() > 0.998


def test_averaging_over_views_makes_the_answer_turn_with_the_image(toy_run: Path, tmp_path: Path):
    image = blobs(64, 64)
    model = load_checkpoint(toy_run)
    answers = []
    for index, pixels in enumerate((image, np.rot90(image))):
        (tmp_path / str(index)).mkdir()
        folder = folder_of(tmp_path / str(index), np.ascontiguousarray(pixels), 0.5)
        (found,) = predict_split(*model, folder, "test", tta=True)
        answers.append(found.predicted)
    turned = torch.rot90(answers[0], 1, dims=(0, 1))
    assert (turned == answers[1]).float().mean() > 0.995
