from pathlib import Path

import numpy as np
import pytest

from serve.contract.manifest import Manifest, read_bundle
from serve.inference.summary import LOW_CONFIDENCE, MppSource, summarise
from serve.inference.tiling import Prediction

LABELS = np.array([[1, 1, 2, 5]] * 3, np.uint8)
CONFIDENCE = np.array([[255, 127, 128, 51]] * 3, np.uint8)


@pytest.fixture(scope="module")
def manifest(toy_bundle: Path) -> Manifest:
    return read_bundle(toy_bundle)


def prediction(*iou_scores: float) -> Prediction:
    return Prediction(LABELS, CONFIDENCE, np.array(iou_scores or [0] * 5, np.float32))


def test_numbers_are_those_of_each_class_in_the_manifests_order(manifest: Manifest) -> None:
    summary = summarise(prediction(0.1, 0.2, 0.3, 0.4, 0.5), manifest)
    classes = summary.classes
    assert [row.name for row in classes] == [tissue.name for tissue in manifest.classes]
    assert [row.label for row in classes] == [1, 2, 3, 4, 5]
    assert [row.pixel_count for row in classes] == [6, 3, 0, 0, 3]
    assert [row.pixel_share for row in classes] == [0.5, 0.25, 0, 0, 0.25]
    means = [row.mean_confidence for row in classes]
    assert means == pytest.approx([382 / 2 / 255, 128 / 255, None, None, 0.2])
    assert [row.low_confidence_share for row in classes] == [0.5, 0, None, None, 1]
    ious = [row.predicted_iou for row in classes]
    assert ious == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert summary.low_confidence_threshold == LOW_CONFIDENCE == 0.5
    assert summary.low_confidence_share == 0.5  # 127 and 51 of 255 are below, 128 is not
    assert (summary.model.name, summary.model.version) == ("segmenter", "1.0.0")
    assert (summary.image.width_px, summary.image.height_px) == (4, 3)


def test_the_iou_is_a_share_and_is_not_told_of_a_head_that_was_not_trained(
    manifest: Manifest,
) -> None:
    wild = prediction(-0.09, 0, 0.5, 1, 1.2)
    assert [row.predicted_iou for row in summarise(wild, manifest).classes] == [0, 0, 0.5, 1, 1]
    untrained = manifest.model_copy(update={"predicts_iou": False})
    assert [row.predicted_iou for row in summarise(wild, untrained).classes] == [None] * 5


@pytest.mark.parametrize(
    ("mpp", "source", "areas"),
    [
        (0.5, "request", [1.5, 0.75, 0, 0, 0.75]),
        (0.5, "OME-XML", [1.5, 0.75, 0, 0, 0.75]),
        (0.5, "model (assumed)", [None] * 5),
        (None, "unknown", [None] * 5),
    ],
)
def test_areas_are_told_where_the_mpp_is_known(
    mpp: float | None, source: MppSource, areas: list[float | None], manifest: Manifest
) -> None:
    summary = summarise(prediction(), manifest, mpp=mpp, mpp_source=source)
    assert [row.area_um2 for row in summary.classes] == areas
    assert (summary.image.mpp, summary.image.mpp_source) == (mpp, source)


def test_a_large_image_is_counted_in_parts_without_losing_a_pixel(manifest: Manifest) -> None:
    labels = np.random.default_rng(0).integers(1, 6, (1100, 1500), np.uint8)
    large = Prediction(labels, np.full_like(labels, 255), np.zeros(5, np.float32))
    counts = [row.pixel_count for row in summarise(large, manifest).classes]
    assert counts == np.bincount(labels.ravel())[1:].tolist()
