"""The same tissue at two um per pixel: trained, exported and served, the answers are as good."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from export.bundle import write_bundle
from export.gate.certificate import CertificateSettings
from export.gate.tiles import validation_tiles
from export.precision.artefacts import PrecisionSettings
from export.settings import BundleSettings
from serve.inference.segmenter import open_segmenter
from serve.settings import ServeSettings
from tests.support.striped_tissue import draw, write_striped_tissue
from tests.support.toy_data import toy_settings
from train.fitting.run import fit
from train.model.checkpoint import read_card

pytestmark = pytest.mark.slow

MODEL_MPP = 0.5
DATA_MPPS = (0.5, 0.25)
ONLY_FLOAT32 = BundleSettings(
    num_parity_tiles=2,
    precision=PrecisionSettings(fp16=False),
    certificate=CertificateSettings(scale_tiles=0),
)


def dice_of_served(bundle: Path, mpp: float) -> float:
    """Mean Dice of the answers for new images of three sizes, `mpp` given."""
    counts = np.zeros((2, 3))  # a row of each class: hits, predicted, true
    with open_segmenter(ServeSettings(bundle=bundle, threads=1)) as segmenter:
        for seed, (height, width) in enumerate([(24, 40), (64, 64), (90, 37)]):
            image, labels = draw(np.random.default_rng(100 + seed), height, width, mpp)
            found = segmenter.segment(image, mpp=mpp).labels
            for row, label in zip(counts, (1, 2), strict=True):
                row += [
                    ((found == label) & (labels == label)).sum(),
                    (found == label).sum(),
                    (labels == label).sum(),
                ]
    return float((2 * counts[:, 0] / counts[:, 1:].sum(axis=1)).mean())


def test_models_trained_at_one_scale_from_images_of_two_are_served_equally_well(tmp_path: Path):
    toy = toy_settings()
    settings = replace(
        toy,
        model=replace(toy.model, mpp=MODEL_MPP),
        optimization=replace(
            toy.optimization, epochs=4, learning_rate=5e-3, warmup_steps=6, batch_size=8
        ),
        augmentation=replace(toy.augmentation, augment="dihedral"),
    )
    scores = {}
    for data_mpp in DATA_MPPS:
        data = write_striped_tissue(tmp_path / f"data{data_mpp}", data_mpp)
        run = tmp_path / f"run{data_mpp}"
        fit(settings, data, run)
        bundle = tmp_path / f"bundle{data_mpp}"
        manifest = write_bundle(run, bundle, replace(ONLY_FLOAT32, validate=data))
        assert read_card(run).mpp == manifest.mpp == MODEL_MPP
        for served_mpp in DATA_MPPS:
            scores[data_mpp, served_mpp] = dice_of_served(bundle, served_mpp)
    assert min(scores.values()) > 0.95, scores
    assert max(scores.values()) - min(scores.values()) < 0.03, scores


def test_the_gate_compares_tiles_of_the_scale_that_the_network_saw(tmp_path: Path):
    tiles = [
        validation_tiles(
            write_striped_tissue(tmp_path / str(mpp), mpp, num_train=1),
            32,
            6,
            class_names=["Narrow", "Wide"],
            mpp=MODEL_MPP,
        )
        for mpp in DATA_MPPS
    ]
    assert tiles[0].names == tiles[1].names
    assert tiles[0].masks is not None
    assert tiles[1].masks is not None
    np.testing.assert_array_equal(tiles[0].masks, tiles[1].masks)
    difference = np.abs(tiles[0].images.astype(int) - tiles[1].images.astype(int))
    assert difference.mean() < 4
