import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serve.answers.registry import FORMATS
from serve.contract.manifest import Manifest, read_bundle
from serve.inference.tiling import LowResProbabilities
from tests.support.answers import source_of

LABELS = np.array([[1, 1, 2, 5, 0]] * 3, np.uint8)
COLORS = [[0xD6, 0x27, 0x28]] * 2 + [[0x2C, 0xA0, 0x2C], [0x7F, 0x7F, 0x7F], [0, 0, 0]]
"""Of the first row; what is not labelled is black."""
IMAGE = np.full((*LABELS.shape, 3), 100, np.uint8)


@pytest.fixture(scope="module")
def manifest(toy_bundle: Path) -> Manifest:
    return read_bundle(toy_bundle)


def picture(name: str, manifest: Manifest, **options: object) -> Image.Image:
    source = source_of(manifest, LABELS, image=IMAGE, confidence=51)
    return Image.open(io.BytesIO(FORMATS[name].render(source, options)))


def test_the_label_image_has_the_labels_as_values_and_the_classes_as_colours(
    manifest: Manifest,
) -> None:
    image = picture("labels", manifest)
    assert (image.format, image.mode) == ("PNG", "P")
    assert np.array_equal(np.asarray(image), LABELS)
    assert np.asarray(image.convert("RGB"))[0].tolist() == COLORS


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"alpha": 0}, [[100] * 3] * 5),
        ({"alpha": 1}, COLORS),
        ({"alpha": 0.25, "classes": ["Tumor"]}, [[128, 84, 85]] * 2 + [[100] * 3] * 3),
        ({"alpha": 1, "classes": ["Stroma"]}, [[100] * 3] * 2 + COLORS[2:3] + [[100] * 3] * 2),
        ({"alpha": 1, "classes": ["Necrosis"]}, [[100] * 3] * 5),
    ],
)
def test_the_overlay_mixes_the_image_and_the_colours_of_the_classes_that_are_shown(
    options: dict[str, object], expected: list[list[int]], manifest: Manifest
) -> None:
    overlay = np.asarray(picture("overlay", manifest, **options))
    assert np.abs(overlay[0] - np.array(expected)).max() <= 1


def test_the_confidence_image_is_grey_and_its_values_are_the_confidence(
    manifest: Manifest,
) -> None:
    image = picture("confidence", manifest)
    assert (image.format, image.mode) == ("PNG", "L")
    assert (np.asarray(image) == 51).all()


def test_arrays_say_where_the_probabilities_are_and_of_which_classes(manifest: Manifest) -> None:
    probabilities = np.arange(30, dtype=np.uint8).reshape(5, 2, 3)
    source = source_of(
        manifest, LABELS, low_res=LowResProbabilities(probabilities, (0.0, 1.0), (4.5, 4.0))
    )
    expected = {"probabilities": probabilities, "origin_px": [0, 1], "stride_px": [4.5, 4]}
    own = {
        "probabilities": {"classes": [tissue.name for tissue in manifest.classes]},
        "arrays": {"labels": LABELS, "confidence": np.full_like(LABELS, 204)},
    }
    for name, others in own.items():
        with np.load(io.BytesIO(FORMATS[name].render(source, {})), allow_pickle=False) as arrays:
            for key, value in {**expected, **others}.items():
                assert np.array_equal(arrays[key], value)
    with np.load(io.BytesIO(FORMATS["arrays"].render(source_of(manifest, LABELS), {}))) as arrays:
        assert set(arrays) == {"labels", "confidence", "summary"}
