from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from serve.contract.errors import BackendUnavailableError
from serve.contract.manifest import LOW_RES_STRIDE, Manifest, read_bundle
from serve.images.tiles import (
    OVERLAP,
    gaussian_window,
    pad_by_reflection,
    tile_origins,
    upsample_and_label,
)
from serve.inference.batching import TileBatcher, TilePool
from serve.inference.onnxruntime import OnnxRuntimeBackend
from serve.inference.tiling import predict
from tests.support.errors import raises
from tests.support.pictures import blobs, painted
from tests.support.toy_bundle import TILE_SIZE_PX

TILE_OUTPUTS = ("labels", "confidence", "iou_scores")


@pytest.fixture(scope="module")
def manifest(toy_bundle: Path) -> Manifest:
    return read_bundle(toy_bundle)


@pytest.fixture(scope="module")
def backend(toy_bundle: Path, manifest: Manifest) -> Iterator[TilePool]:
    runner = TilePool(OnnxRuntimeBackend(toy_bundle, manifest, threads=1), max_tiles=1)
    yield runner
    runner.close()


class FakeBackend:
    """Answers each tile with what a function of its index says."""

    def __init__(self, probabilities: NDArray[np.uint8], iou_scores: NDArray[np.float32]) -> None:
        self._probabilities = probabilities
        self._iou_scores = iou_scores
        self._answered = 0

    def infer(self, images: NDArray[np.uint8], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        assert set(outputs) == {"low_res_probabilities", "iou_scores"}
        part = slice(self._answered, self._answered + len(images))
        self._answered = part.stop
        return {
            "low_res_probabilities": self._probabilities[part],
            "iou_scores": self._iou_scores[part],
        }

    def is_ready(self) -> bool:
        return True

    def close(self) -> None:
        pass


def test_an_image_of_one_tile_gets_the_models_own_bytes(
    backend: TilePool, manifest: Manifest
) -> None:
    image = blobs(TILE_SIZE_PX, TILE_SIZE_PX)
    own = backend.submit(image, TILE_OUTPUTS).result()
    prediction = predict(image, backend, manifest)
    assert prediction.labels.tobytes() == own["labels"].tobytes()
    assert prediction.confidence.tobytes() == own["confidence"].tobytes()
    assert prediction.iou_scores.tobytes() == own["iou_scores"].tobytes()


@pytest.mark.parametrize("height", [1, 3, 20, 64, 65, 131])
@pytest.mark.parametrize("width", [1, 30, 64, 66, 200])
def test_an_image_of_any_size_gets_labels_of_that_size(
    height: int, width: int, backend: TilePool, manifest: Manifest
) -> None:
    prediction = predict(painted(np.full((height, width), 2)), backend, manifest)
    assert prediction.labels.shape == prediction.confidence.shape == (height, width)
    assert (prediction.labels == 2).all()
    assert (prediction.confidence == 255).all()


def test_a_small_image_is_labelled_as_in_the_corner_of_its_mirrored_tile(
    backend: TilePool, manifest: Manifest
) -> None:
    image = blobs(20, 30)
    mirrored = np.concatenate([image, image[::-1], image, image[::-1]])[:TILE_SIZE_PX]
    mirrored = np.concatenate([mirrored, mirrored[:, ::-1], mirrored], axis=1)[:, :TILE_SIZE_PX]
    own = backend.submit(np.ascontiguousarray(mirrored), TILE_OUTPUTS).result()
    assert np.array_equal(predict(image, backend, manifest).labels, own["labels"][:20, :30])


def test_padding_mirrors_as_often_as_needed() -> None:
    row = np.array([[[1, 1, 1], [2, 2, 2], [3, 3, 3]]], np.uint8)
    padded = pad_by_reflection(row, 2, 10)
    assert padded[..., 0].tolist() == [[1, 2, 3, 3, 2, 1, 1, 2, 3, 3]] * 2


def test_an_image_that_is_large_enough_is_not_copied_by_padding() -> None:
    image = blobs(8, 8)
    assert pad_by_reflection(image, 8, 8) is image


@pytest.mark.parametrize("tile", [4, 16, 64, 256, 1024])
@pytest.mark.parametrize("excess", [0, 4, 8, 60, 64, 188, 192, 196, 1000, 4096])
def test_tiles_reach_both_edges_and_overlap_everywhere(tile: int, excess: int) -> None:
    origins = np.array(tile_origins(tile + excess, tile))
    assert origins[0] == 0
    assert origins[-1] == excess
    assert (origins % LOW_RES_STRIDE == 0).all()
    steps = np.diff(origins)
    assert (steps > 0).all()
    assert (steps <= max(tile * (1 - OVERLAP), LOW_RES_STRIDE)).all()


def test_there_are_no_more_tiles_than_the_overlap_asks_for() -> None:
    assert tile_origins(1024 + 768, 1024) == [0, 768]
    assert tile_origins(1024 + 772, 1024) == [0, 384, 772]


def test_the_window_is_highest_at_the_centre_and_positive_at_the_corners() -> None:
    window = gaussian_window(16)
    assert window.max() == window[8, 8] == window[7, 7]
    assert 0 < window.min() == window[0, 0] < 1e-5
    row = np.exp(-((np.arange(16) - 7.5) ** 2) / (2 * 2.0**2))  # an eighth of the tile is 2 cells
    np.testing.assert_allclose(window, np.outer(row, row), rtol=1e-5)


def test_upsampling_is_bilinear_with_half_pixel_centres_and_clamped_edges() -> None:
    probabilities = np.random.default_rng(0).uniform(0, 255, (3, 150, 9)).astype(np.float32)
    height, width = 150 * LOW_RES_STRIDE, 9 * LOW_RES_STRIDE

    def along(values: NDArray[np.float32], axis: int, length: int) -> NDArray[np.float32]:
        source = (np.arange(length) + 0.5) / LOW_RES_STRIDE - 0.5
        source = source.clip(0, values.shape[axis] - 1)
        low = np.floor(source).astype(int)
        high = np.minimum(low + 1, values.shape[axis] - 1)
        shape = [1, 1, 1]
        shape[axis] = length
        share = (source - low).reshape(shape)
        return values.take(low, axis) * (1 - share) + values.take(high, axis) * share

    expected = along(along(probabilities, 1, height), 2, width)
    labels, confidence = upsample_and_label(probabilities, height, width)
    assert np.array_equal(labels, expected.argmax(axis=0) + 1)
    assert np.abs(confidence - expected.max(axis=0)).max() < 0.501


@pytest.mark.parametrize(
    ("shift", "scale"),
    [((37, 21), 1), ((64, 64), 1), ((90, 113), 1), ((37, 21), 0.6), ((37, 21), 1.7)],
)
def test_a_shifted_crop_agrees_with_the_whole_image_away_from_its_edges(
    shift: tuple[int, int], scale: float, backend: TilePool, manifest: Manifest
) -> None:
    image = blobs(500, 600, scale=3)
    part = np.s_[shift[0] : shift[0] + 350, shift[1] : shift[1] + 400]
    whole, crop = (
        predict(pixels, backend, manifest, scale=(scale, scale)).labels
        for pixels in (image, image[part])
    )
    assert (crop == whole[part])[32:-32, 32:-32].mean() >= 0.995


def test_what_a_tile_says_at_its_own_edge_is_outvoted_by_its_neighbours(
    manifest: Manifest,
) -> None:
    low = TILE_SIZE_PX // LOW_RES_STRIDE
    tile = np.zeros((5, low, low), np.uint8)
    tile[1] = 255  # the middle is sure of class 2, the rim of class 4
    tile[1, :, :2] = tile[1, :, -2:] = 0
    tile[3, :, :2] = tile[3, :, -2:] = 255
    width = TILE_SIZE_PX + 3 * 48
    fake = FakeBackend(np.stack([tile] * 4), np.zeros((4, 5), np.float32))
    runner = TilePool(fake, max_tiles=1)
    labels = predict(np.zeros((TILE_SIZE_PX, width, 3), np.uint8), runner, manifest).labels
    rim = 3 * LOW_RES_STRIDE
    assert (labels[:, rim:-rim] == 2).all()
    assert (labels[:, 0] == 4).all()


def test_iou_scores_are_weighted_by_the_area_of_the_class_in_each_tile(manifest: Manifest) -> None:
    low = TILE_SIZE_PX // LOW_RES_STRIDE
    probabilities = np.zeros((2, 5, low, low), np.uint8)
    probabilities[0, 0] = 255  # the first tile is all class 1
    probabilities[1, 0, : low // 4] = 255  # the second a quarter class 1, else class 2
    probabilities[1, 1, low // 4 :] = 255
    scores = np.array([[0.9, 0.1, 0.3, 0, 0], [0.4, 0.8, 0.5, 0, 0]], np.float32)
    image = np.zeros((TILE_SIZE_PX, TILE_SIZE_PX + 48, 3), np.uint8)
    runner = TilePool(FakeBackend(probabilities, scores), max_tiles=1)
    found = predict(image, runner, manifest).iou_scores
    assert found == pytest.approx([(0.9 + 0.25 * 0.4) / 1.25, 0.8, 0.4, 0, 0])


@pytest.mark.parametrize(
    "scale", [(1.0, 1.0), (0.37, 0.37), (0.5, 0.5), (1.3, 1.3), (2.0, 2.0), (0.5, 1.3)]
)
def test_a_large_image_gets_its_labels_in_its_own_pixels_also_where_it_is_resampled(
    scale: tuple[float, float], backend: TilePool, manifest: Manifest
) -> None:
    rows, columns = (round(120 / factor) for factor in scale)  # coarse enough for the decoder
    truth = np.repeat(np.repeat(np.arange(6).reshape(2, 3) % 5 + 1, rows, axis=0), columns, axis=1)
    prediction = predict(painted(truth), backend, manifest, scale=scale)
    assert prediction.labels.shape == prediction.confidence.shape == truth.shape
    assert (prediction.labels == truth).mean() > 0.98


@pytest.mark.parametrize(("size", "factor"), [((300, 400), 0.5), ((80, 120), 0.5), ((20, 30), 2.0)])
def test_a_resampled_image_is_seen_by_the_model_at_the_models_scale(
    size: tuple[int, int], factor: float, backend: TilePool, manifest: Manifest
) -> None:
    """Also where it is one tile then."""
    image, (rows, columns) = blobs(*size, scale=3), (round(factor * length) for length in size)
    seen = np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling.BICUBIC))
    at_once = predict(seen, backend, manifest, with_probabilities=True).low_res
    scale = factor, factor
    resampled = predict(image, backend, manifest, scale=scale, with_probabilities=True).low_res
    assert at_once is not None
    assert resampled is not None
    assert np.array_equal(at_once.probabilities, resampled.probabilities)
    assert at_once.stride_px == (4, 4)
    assert resampled.stride_px == (4 / factor, 4 / factor)


@pytest.mark.parametrize("size", [(64, 64), (10, 21), (150, 333)])
def test_probabilities_cover_the_image_and_agree_with_its_labels(
    size: tuple[int, int], backend: TilePool, manifest: Manifest
) -> None:
    prediction = predict(blobs(*size, noise=5), backend, manifest, with_probabilities=True)
    low_res = prediction.low_res
    assert low_res is not None
    assert low_res.probabilities.shape == (5, -(-size[0] // 4), -(-size[1] // 4))
    assert low_res.probabilities.dtype == np.uint8
    likeliest = low_res.probabilities.argmax(axis=0) + 1
    near = likeliest.repeat(4, axis=0).repeat(4, axis=1)[: size[0], : size[1]]
    assert (near == prediction.labels).mean() > 0.9


@pytest.mark.parametrize("kind", [TileBatcher, TilePool])
def test_tiles_that_share_a_model_give_the_same_answer(
    kind: type, toy_bundle: Path, backend: TilePool, manifest: Manifest
) -> None:
    size = {"max_batch_size": 3} if kind is TileBatcher else {"max_tiles": 3}
    runner = kind(OnnxRuntimeBackend(toy_bundle, manifest), **size)
    image = blobs(500, 300)
    shared, alone = predict(image, runner, manifest), predict(image, backend, manifest)
    runner.close()
    assert np.array_equal(shared.labels, alone.labels)
    assert np.array_equal(shared.confidence, alone.confidence)
    assert np.allclose(shared.iou_scores, alone.iou_scores)


def test_a_tile_that_fails_calls_off_those_that_wait(manifest: Manifest) -> None:
    class FirstFails(FakeBackend):
        futures: ClassVar[list[Future[Any]]] = []

        def submit(self, tile: NDArray[np.uint8], outputs: Sequence[str]) -> Future[Any]:
            self.futures.append(Future())
            if len(self.futures) == 1:
                self.futures[0].set_exception(BackendUnavailableError("lost"))
            return self.futures[-1]

    runner = FirstFails(np.zeros(0, np.uint8), np.zeros(0, np.float32))
    with raises(BackendUnavailableError, "lost"):
        predict(blobs(400, 400), runner, manifest)
    assert len(runner.futures) > 1
    assert all(future.cancelled() for future in runner.futures[1:])
