"""Segments an image of any size with a model of one tile size.

Tiles overlap, and their probabilities are blended (see `serve.images.tiles`). Where one tile
suffices, the model's own `labels` and `confidence` are taken as they are.

An image at another um per pixel than the model's is resampled first. Its labels are computed from
the blend directly at the image's own size, so that nothing is resampled twice.
"""

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.contract.manifest import LOW_RES_STRIDE, Manifest
from serve.images.tiles import (
    UNSCALED,
    Blend,
    Scale,
    cut,
    pad_by_reflection,
    pad_to_tiles,
    resample,
    scaled_size,
    upsample_and_label,
)
from serve.inference.batching import TileAnswer, TileRunner


@dataclass(frozen=True)
class LowResProbabilities:
    """The probabilities of all classes at the decoder's resolution."""

    probabilities: NDArray[np.uint8]
    """(C, h, w) uint8, 255 = 1.0."""
    origin_px: tuple[float, float]
    """(y, x) of the first cell's corner, in pixels of the image."""
    stride_px: tuple[float, float]
    """(y, x) from a cell to the next one, in pixels of the image."""


@dataclass(frozen=True)
class Prediction:
    """The model's answer for a whole image."""

    labels: NDArray[np.uint8]
    """(H, W) uint8, 1..C."""
    confidence: NDArray[np.uint8]
    """(H, W) uint8, probability of the label, 255 = 1.0."""
    iou_scores: NDArray[np.float32]
    """(C,) float32, the IoU that the model predicts for each class's mask."""
    low_res: LowResProbabilities | None = None
    """The probabilities of all classes, if requested."""


def predict(
    image: NDArray[np.uint8],
    runner: TileRunner,
    manifest: Manifest,
    *,
    scale: Scale = UNSCALED,
    with_probabilities: bool = False,
) -> Prediction:
    """Segment an image of any size.

    Args:
        image: (H, W, 3) uint8, RGB in [0, 255].
        runner: runs the model, on several tiles at the same time.
        manifest: the model's tile size, classes and batch size.
        scale: factors, along (y, x), that bring the image to the model's um per pixel.
        with_probabilities: also return the probabilities of all classes.
    """
    height, width = image.shape[:2]
    tile = manifest.tile_size_px
    scaled = resample(image, *scaled_size(height, width, scale))
    rows, columns = scaled.shape[:2]
    if scale == UNSCALED and rows <= tile and columns <= tile:
        return _predict_one_tile(image, runner, tile, with_probabilities)
    padded = pad_to_tiles(scaled, tile)
    blend = Blend(len(manifest.classes), padded.shape[0], padded.shape[1], tile)
    for origin, answer in _infer_tiles(padded, runner, manifest):
        blend.add(origin, answer["low_res_probabilities"], answer["iou_scores"])
    probabilities = blend.probabilities()
    extent = rows / LOW_RES_STRIDE, columns / LOW_RES_STRIDE
    labels, confidence = upsample_and_label(probabilities, height, width, extent)
    low_res = _low_res(probabilities, (height, width), extent) if with_probabilities else None
    return Prediction(labels, confidence, blend.iou_scores(), low_res)


def _infer_tiles(
    padded: NDArray[np.uint8], runner: TileRunner, manifest: Manifest
) -> Iterator[tuple[tuple[int, int], TileAnswer]]:
    """Run the model on every tile; yields each tile's (y, x) with its answer.

    Keeps two batches of tiles in flight, so that the model does not wait while tiles are blended.
    """
    outputs = ("low_res_probabilities", "iou_scores")
    pending: deque[tuple[tuple[int, int], Future[TileAnswer]]] = deque()
    try:
        for place, tile in cut(padded, manifest.tile_size_px):
            if len(pending) >= 2 * manifest.max_batch_size:
                origin, future = pending.popleft()
                yield origin, future.result()
            pending.append((place, runner.submit(tile, outputs)))
        while pending:
            origin, future = pending.popleft()
            yield origin, future.result()
    finally:
        for _, future in pending:
            future.cancel()


def _predict_one_tile(
    image: NDArray[np.uint8], runner: TileRunner, tile: int, with_probabilities: bool
) -> Prediction:
    height, width = image.shape[:2]
    names = ["labels", "confidence", "iou_scores"]
    if with_probabilities:
        names.append("low_res_probabilities")
    answer = runner.ask(pad_by_reflection(image, tile, tile), names)
    low_res = None
    if with_probabilities:
        extent = height / LOW_RES_STRIDE, width / LOW_RES_STRIDE
        low_res = _low_res(answer["low_res_probabilities"], (height, width), extent)
    return Prediction(
        labels=np.ascontiguousarray(answer["labels"][:height, :width]),
        confidence=np.ascontiguousarray(answer["confidence"][:height, :width]),
        iou_scores=answer["iou_scores"],
        low_res=low_res,
    )


def _low_res(
    probabilities: NDArray[Any], size: tuple[int, int], extent: tuple[float, float]
) -> LowResProbabilities:
    """The part of the probabilities that the image covers, as bytes."""
    rows, columns = (math.ceil(length) for length in extent)
    covered = np.rint(probabilities[:, :rows, :columns]).clip(0, 255).astype(np.uint8)
    return LowResProbabilities(covered, (0.0, 0.0), (size[0] / extent[0], size[1] / extent[1]))
