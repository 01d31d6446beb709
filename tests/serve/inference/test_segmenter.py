from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from serve.contract.errors import ImageError, ImageTooLargeError, OptionError
from serve.contract.manifest import read_bundle
from serve.images.decode import Picture
from serve.images.mpp import PixelSize
from serve.inference.batching import TilePool
from serve.inference.onnxruntime import OnnxRuntimeBackend
from serve.inference.segmenter import TileSegmenter, open_segmenter
from serve.settings import ServeSettings
from tests.support.certificate import certificate_that_warns
from tests.support.errors import raises
from tests.support.pictures import blobs
from tests.support.toy_bundle import CLASSES

IMAGE = blobs(100, 130, scale=0.5)


@pytest.fixture(scope="module")
def segmenter(toy_bundle: Path) -> Iterator[TileSegmenter]:
    with open_segmenter(ServeSettings(bundle=toy_bundle, threads=1)) as segmenter:
        yield segmenter


def _unscaled(toy_bundle: Path) -> TileSegmenter:
    manifest = read_bundle(toy_bundle).model_copy(update={"mpp": None})
    pool = TilePool(OnnxRuntimeBackend(toy_bundle, manifest), max_tiles=1)
    return TileSegmenter(pool, manifest)


def test_an_image_of_another_mpp_is_resampled(segmenter: TileSegmenter) -> None:
    coarse = segmenter.segment(IMAGE, mpp=1.0, with_probabilities=True).low_res
    assert coarse is not None
    assert coarse.stride_px == (2, 2)


def test_an_image_whose_pixels_are_not_square_is_resampled_along_each_axis(
    segmenter: TileSegmenter,
) -> None:
    image = blobs(128, 128, scale=0.5)
    flat = np.ascontiguousarray(image[::2])  # rows of 1 um, columns of 0.5
    result = segmenter.segment(flat, mpp=PixelSize(0.5, 1.0), with_probabilities=True)
    assert result.low_res is not None
    assert result.low_res.stride_px == (2, 4)
    assert result.labels.shape == (64, 128)
    assert np.mean(result.labels == segmenter.segment(image).labels[::2]) > 0.95
    found = result.summary
    assert found.image.mpp_xy == (0.5, 1.0)
    area = sum(row.area_um2 or 0 for row in found.classes)
    assert area == pytest.approx(64 * 128 * 0.5 * 1.0)


def test_pixels_far_from_squares_are_refused_by_who_says_so(segmenter: TileSegmenter) -> None:
    with raises(ImageError, "OME-XML", "0.25 x 2.5", code="pixel_aspect"):
        segmenter.segment(IMAGE, mpp=PixelSize(0.25, 2.5), mpp_source="OME-XML")


def test_an_image_of_nearly_the_models_mpp_is_not_resampled(segmenter: TileSegmenter) -> None:
    result = segmenter.segment(IMAGE, mpp=0.5047)
    assert np.array_equal(result.labels, segmenter.segment(IMAGE).labels)
    assert result.summary.image.mpp == 0.5047


def test_an_image_of_a_scale_that_costs_labels_is_told_of_beside_the_files_own_notes(
    toy_bundle: Path,
) -> None:
    certificate = certificate_that_warns(len(CLASSES))
    manifest = read_bundle(toy_bundle).model_copy(update={"scale_certificate": certificate})
    backend = TilePool(OnnxRuntimeBackend(toy_bundle, manifest), max_tiles=1)
    with TileSegmenter(backend, manifest) as certified:
        coarse = certified.segment_picture(Picture(IMAGE, notes=("turned upright",)), mpp=0.62)
        assert certified.segment(IMAGE, mpp=0.51).summary.image.notes == ()
        assert certified.segment(IMAGE).summary.image.notes == ()
    first, warning = coarse.summary.image.notes
    assert first == "turned upright"
    assert "0.62" in warning
    assert "90.4%" in warning


def test_answers_say_where_resampling_gives_other_labels_than_the_models_origin(
    toy_bundle: Path,
) -> None:
    note = "SAM-Path resized images in its own way"
    manifest = read_bundle(toy_bundle).model_copy(update={"label_note": note})
    backend = TilePool(OnnxRuntimeBackend(toy_bundle, manifest), max_tiles=1)
    with TileSegmenter(backend, manifest) as imported:
        assert imported.segment(IMAGE, mpp=0.505).summary.image.notes == ()
        assert imported.segment(IMAGE).summary.image.notes == ()
        assert imported.segment(IMAGE, mpp=0.62).summary.image.notes == (note,)


def test_an_image_too_large_at_the_models_mpp_is_refused(toy_bundle: Path) -> None:
    settings = ServeSettings(bundle=toy_bundle, max_image_megapixels=1)
    image = blobs(600, 500)
    too_large = raises(ImageTooLargeError, "1000 x 1200: 1200000 pixels", code="too_many_tiles")
    with open_segmenter(settings) as segmenter, too_large:
        segmenter.segment(image, mpp=1.0)


def test_an_image_of_more_tiles_than_allowed_is_refused_with_their_number(toy_bundle: Path) -> None:
    settings = ServeSettings(bundle=toy_bundle, max_image_tiles=8)
    side = read_bundle(toy_bundle).tile_size_px
    with open_segmenter(settings) as segmenter:
        segmenter.segment(blobs(side, side))
        with raises(ImageTooLargeError, "9 tiles", "At most 8 tiles", code="too_many_tiles"):
            segmenter.segment(blobs(2 * side, 2 * side))


def test_an_image_is_enlarged_four_times_at_most(segmenter: TileSegmenter) -> None:
    small = IMAGE[:20, :20]
    assert segmenter.segment(small, mpp=2.0).labels.shape == (20, 20)
    with raises(ImageTooLargeError, "4.2 times", code="enlarged_too_far"):
        segmenter.segment(small, mpp=2.1)


def test_an_absurd_mpp_is_refused(segmenter: TileSegmenter) -> None:
    with raises(OptionError, "1e-06"):
        segmenter.segment(IMAGE, mpp=1e-6)


def test_a_model_without_mpp_takes_the_image_as_it_is_and_knows_its_area(toy_bundle: Path) -> None:
    summary = _unscaled(toy_bundle).segment(IMAGE, mpp=2).summary
    assert sum(row.area_um2 or 0 for row in summary.classes) == pytest.approx(4 * 100 * 130)


def test_without_any_mpp_it_is_unknown(toy_bundle: Path) -> None:
    image = _unscaled(toy_bundle).segment(IMAGE).summary.image
    assert (image.mpp, image.mpp_source) == (None, "unknown")


def test_settings_limit_the_batch(toy_bundle: Path) -> None:
    sizes: list[int] = []

    class Counting(OnnxRuntimeBackend):
        def infer(self, images, outputs):  # type: ignore[no-untyped-def]
            sizes.append(len(images))
            return super().infer(images, outputs)

    settings = ServeSettings(bundle=toy_bundle, max_batch_size=2)
    with open_segmenter(
        settings, observe=lambda _: Counting(toy_bundle, read_bundle(toy_bundle))
    ) as segmenter:
        segmenter.segment(blobs(300, 300))
    assert max(sizes) == 2


def test_a_thin_image_that_costs_more_tiles_than_an_image_may_have_pixels_is_refused(
    toy_bundle: Path,
) -> None:
    with open_segmenter(ServeSettings(bundle=toy_bundle, max_image_megapixels=1)) as segmenter:
        tile = segmenter.manifest.tile_size_px
        assert segmenter.num_tiles(1, 10**6 // tile, None) > 100
        with raises(ImageTooLargeError, code="too_many_tiles"):
            segmenter.num_tiles(1, 10**6, None)
