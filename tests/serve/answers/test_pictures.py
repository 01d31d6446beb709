import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serve.answers.arrays import arrays_npz, probabilities_npz
from serve.answers.pictures import confidence_png, label_png, overlay_png
from serve.contract.manifest import Manifest, read_bundle
from serve.inference.summary import LOW_CONFIDENCE, MppSource, summarise
from serve.inference.tiling import LowResProbabilities, Prediction

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


def test_an_overlay_of_some_classes_leaves_the_others_as_they_are(manifest: Manifest) -> None:
    image = np.full((*LABELS.shape, 3), 100, np.uint8)
    overlay = np.asarray(_open(overlay_png(image, LABELS, manifest, alpha=1, shown=[2])))
    assert overlay[0].tolist() == [[100] * 3, [100] * 3, [0x2C, 0xA0, 0x2C], [100] * 3]


def test_an_overlay_of_no_class_is_the_image(manifest: Manifest) -> None:
    image = np.full((*LABELS.shape, 3), 100, np.uint8)
    assert np.array_equal(_open(overlay_png(image, LABELS, manifest, shown=[])), image)


def test_the_confidence_image_is_grey_and_its_values_are_the_confidence() -> None:
    image = _open(confidence_png(CONFIDENCE))
    assert (image.format, image.mode) == ("PNG", "L")
    assert np.array_equal(np.asarray(image), CONFIDENCE)


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


def test_the_iou_of_a_head_that_was_not_trained_is_not_told(
    prediction: Prediction, manifest: Manifest
) -> None:
    untrained = manifest.model_copy(update={"predicts_iou": False})
    assert [row.predicted_iou for row in summarise(prediction, untrained).classes] == [None] * 5


def test_the_predicted_iou_is_a_share_whatever_the_model_says(
    prediction: Prediction, manifest: Manifest
) -> None:
    wild = replace(prediction, iou_scores=np.array([-0.09, 0, 0.5, 1, 1.2], np.float32))
    found = [row.predicted_iou for row in summarise(wild, manifest).classes]
    assert found == [0, 0, 0.5, 1, 1]


def test_low_confidence_counts_pixels_below_one_half(
    prediction: Prediction, manifest: Manifest
) -> None:
    summary = summarise(prediction, manifest)
    assert summary.low_confidence_threshold == LOW_CONFIDENCE == 0.5
    assert summary.low_confidence_share == 0.5  # 127 and 51 of 255 are below, 128 is not


def test_low_confidence_is_also_counted_per_class(
    prediction: Prediction, manifest: Manifest
) -> None:
    found = [row.low_confidence_share for row in summarise(prediction, manifest).classes]
    assert found == [0.5, 0, None, None, 1]


@pytest.mark.parametrize("source", ["request", "OME-XML"])
def test_a_known_mpp_gives_areas(
    source: MppSource, prediction: Prediction, manifest: Manifest
) -> None:
    summary = summarise(prediction, manifest, mpp=0.5, mpp_source=source)
    assert [row.area_um2 for row in summary.classes] == [1.5, 0.75, 0, 0, 0.75]
    assert (summary.image.mpp, summary.image.mpp_source) == (0.5, source)


@pytest.mark.parametrize(("mpp", "source"), [(0.5, "model (assumed)"), (None, "unknown")])
def test_an_assumed_mpp_gives_no_areas(
    mpp: float | None, source: MppSource, prediction: Prediction, manifest: Manifest
) -> None:
    summary = summarise(prediction, manifest, mpp=mpp, mpp_source=source)
    assert [row.area_um2 for row in summary.classes] == [None] * 5


def test_the_arrays_have_the_probabilities_only_where_there_are_any(
    prediction: Prediction, manifest: Manifest
) -> None:
    low_res = LowResProbabilities(np.ones((5, 1, 1), np.uint8), (0.0, 0.0), (4.0, 4.0))
    summary = summarise(prediction, manifest)
    for wanted, names in ((None, set()), (low_res, {"probabilities", "origin_px", "stride_px"})):
        content = arrays_npz(LABELS, CONFIDENCE, summary, wanted)
        with np.load(io.BytesIO(content)) as arrays:
            assert set(arrays) == {"labels", "confidence", "summary"} | names


def test_the_probabilities_say_where_they_are_and_of_which_classes(manifest: Manifest) -> None:
    low_res = LowResProbabilities(np.ones((5, 2, 3), np.uint8), (0.0, 0.0), (4.5, 4.0))
    with np.load(io.BytesIO(probabilities_npz(low_res, manifest)), allow_pickle=False) as arrays:
        assert arrays["probabilities"].shape == (5, 2, 3)
        assert arrays["origin_px"].tolist() == [0, 0]
        assert arrays["stride_px"].tolist() == [4.5, 4]
        assert arrays["classes"].tolist() == [tissue.name for tissue in manifest.classes]


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
