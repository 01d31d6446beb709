import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serve.manifest import Manifest, read_bundle
from serve.outputs import LOW_CONFIDENCE, label_png, overlay_png, summarise
from serve.tiling import Prediction

LABELS = np.array([[1, 1, 2, 5]] * 3, np.uint8)
CONFIDENCE = np.array([[255, 127, 128, 51]] * 3, np.uint8)


@pytest.fixture(scope="module")
def manifest(toy_bundle: Path) -> Manifest:
    return read_bundle(toy_bundle)


@pytest.fixture(scope="module")
def prediction() -> Prediction:
    return Prediction(LABELS, CONFIDENCE, np.array([0.1, 0.2, 0.3, 0.4, 0.5], np.float32))


def _open(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))


def test_the_label_image_is_indexed_and_its_values_are_the_labels(manifest: Manifest) -> None:
    image = _open(label_png(LABELS, manifest))
    assert (image.format, image.mode) == ("PNG", "P")
    assert np.array_equal(np.asarray(image), LABELS)


def test_the_label_image_shows_the_colours_of_the_classes(manifest: Manifest) -> None:
    colors = np.asarray(_open(label_png(LABELS, manifest)).convert("RGB"))
    assert colors[0].tolist() == [
        [0xD6, 0x27, 0x28],
        [0xD6, 0x27, 0x28],
        [0x2C, 0xA0, 0x2C],
        [0x7F, 0x7F, 0x7F],
    ]


def test_an_unlabelled_pixel_is_black_in_the_label_image(manifest: Manifest) -> None:
    colors = _open(label_png(np.zeros((1, 1), np.uint8), manifest)).convert("RGB")
    assert colors.getpixel((0, 0)) == (0, 0, 0)


def test_the_overlay_mixes_image_and_colours(manifest: Manifest) -> None:
    image = np.full((*LABELS.shape, 3), 100, np.uint8)
    overlay = np.asarray(_open(overlay_png(image, LABELS, manifest, alpha=0.25)))
    assert overlay[0, 0].tolist() == pytest.approx([128, 84, 85], abs=1)  # 3/4 100 + 1/4 colour


def test_an_overlay_without_opacity_is_the_image(manifest: Manifest) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*LABELS.shape, 3), np.uint8)
    assert np.array_equal(_open(overlay_png(image, LABELS, manifest, alpha=0)), image)


def test_pixels_are_counted_per_class(prediction: Prediction, manifest: Manifest) -> None:
    classes = summarise(prediction, manifest).classes
    assert [row.pixel_count for row in classes] == [6, 3, 0, 0, 3]
    assert [row.pixel_share for row in classes] == [0.5, 0.25, 0, 0, 0.25]


def test_classes_keep_the_manifests_order_and_their_label(
    prediction: Prediction, manifest: Manifest
) -> None:
    classes = summarise(prediction, manifest).classes
    assert [row.name for row in classes] == [tissue.name for tissue in manifest.classes]
    assert [row.label for row in classes] == [1, 2, 3, 4, 5]


def test_confidence_is_averaged_per_class_and_null_where_there_is_none(
    prediction: Prediction, manifest: Manifest
) -> None:
    found = [row.mean_confidence for row in summarise(prediction, manifest).classes]
    assert found == pytest.approx([382 / 2 / 255, 128 / 255, None, None, 0.2])


def test_the_predicted_iou_is_passed_on(prediction: Prediction, manifest: Manifest) -> None:
    found = [row.predicted_iou for row in summarise(prediction, manifest).classes]
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_low_confidence_counts_pixels_below_one_half(
    prediction: Prediction, manifest: Manifest
) -> None:
    summary = summarise(prediction, manifest)
    assert summary.low_confidence_threshold == LOW_CONFIDENCE == 0.5
    assert summary.low_confidence_share == 0.5  # 127 and 51 of 255 are below, 128 is not


def test_the_summary_names_the_model_and_the_size(
    prediction: Prediction, manifest: Manifest
) -> None:
    summary = summarise(prediction, manifest)
    assert (summary.model.name, summary.model.version) == ("segmenter", "1.0.0")
    assert (summary.image.width_px, summary.image.height_px) == (4, 3)


def test_a_large_image_is_counted_in_parts_without_losing_a_pixel(manifest: Manifest) -> None:
    labels = np.random.default_rng(0).integers(1, 6, (1100, 1500), np.uint8)
    large = Prediction(labels, np.full_like(labels, 255), np.zeros(5, np.float32))
    counts = [row.pixel_count for row in summarise(large, manifest).classes]
    assert counts == np.bincount(labels.ravel())[1:].tolist()
