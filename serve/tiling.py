"""Images of any size through a model of one tile size.

Shape legend: H, W: the image; T: tile size; C: classes; N: tiles; h, w: H/4, W/4 of the padded
image, the decoder's resolution.

Tiles overlap. What is blended is `low_res_probabilities`, weighted by a Gaussian window, so that
a tile counts most where it has seen the most context; the blend is then upsampled bilinearly
with half-pixel centres, as SAM upsamples its masks (`align_corners=False`). Where one tile
suffices, the model's own `labels` and `confidence` are taken as they are.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.backends import Backend
from serve.manifest import LOW_RES_STRIDE, Manifest

OVERLAP = 0.25
"""Share of a tile, along each axis, that it has in common with the next one, at least."""
SIGMA = 0.125
"""Standard deviation of the Gaussian window, as a share of the tile."""
_STRIP_ROWS = 64
"""Rows at the decoder's resolution that are upsampled at once: bounds the memory."""


@dataclass(frozen=True)
class Prediction:
    """What the model says of a whole image."""

    labels: NDArray[np.uint8]
    """(H, W) uint8, 1..C."""
    confidence: NDArray[np.uint8]
    """(H, W) uint8, probability of the label, 255 = 1.0."""
    iou_scores: NDArray[np.float32]
    """(C,) float32, the IoU that the model predicts for each class's mask."""


def predict(image: NDArray[np.uint8], backend: Backend, manifest: Manifest) -> Prediction:
    """Segment an image of any size.

    Args:
        image: (H, W, 3) uint8, RGB in [0, 255].
        backend: runs the model.
        manifest: the model's tile size, classes and batch size.
    """
    height, width = image.shape[:2]
    tile = manifest.tile_size_px
    if height <= tile and width <= tile:
        return _predict_one_tile(image, backend, tile)
    padded = pad_by_reflection(image, max(_whole(height), tile), max(_whole(width), tile))
    origins = [
        (y, x)
        for y in tile_origins(padded.shape[0], tile)
        for x in tile_origins(padded.shape[1], tile)
    ]
    blend = _Blend(len(manifest.classes), padded.shape[0], padded.shape[1], tile)
    for start in range(0, len(origins), manifest.max_batch_size):
        batch = origins[start : start + manifest.max_batch_size]
        tiles = np.stack([padded[y : y + tile, x : x + tile] for y, x in batch])  # N x T x T x 3
        outputs = backend.infer(tiles, ("low_res_probabilities", "iou_scores"))
        for origin, probabilities, iou_scores in zip(
            batch, outputs["low_res_probabilities"], outputs["iou_scores"], strict=True
        ):
            blend.add(origin, probabilities, iou_scores)
    labels, confidence = upsample_and_label(blend.probabilities(), height, width)
    return Prediction(labels, confidence, blend.iou_scores())


def tile_origins(length: int, tile: int) -> list[int]:
    """Where tiles start along an axis: evenly spread, from edge to edge, on the decoder's grid.

    Args:
        length: pixels of the axis, at least `tile`; both are multiples of LOW_RES_STRIDE.
        tile: pixels of a tile.
    """
    assert length >= tile
    assert length % LOW_RES_STRIDE == tile % LOW_RES_STRIDE == 0
    cells = (length - tile) // LOW_RES_STRIDE
    largest_step = max(int(tile * (1 - OVERLAP)) // LOW_RES_STRIDE, 1)
    steps = math.ceil(cells / largest_step)
    return [index * cells // max(steps, 1) * LOW_RES_STRIDE for index in range(steps + 1)]


def pad_by_reflection(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Pad below and on the right by mirroring, as often as needed; the image stays at the top left.

    Args:
        image: (H, W, 3) uint8.
        height: rows wanted, at least H.
        width: columns wanted, at least W.
    """
    below, right = height - image.shape[0], width - image.shape[1]
    if below == 0 and right == 0:
        return image
    return np.pad(image, ((0, below), (0, right), (0, 0)), mode="symmetric")


def gaussian_window(size: int) -> NDArray[np.float32]:
    """A (size, size) float32 window, 1 at the centre and above 0 everywhere."""
    offsets = (np.arange(size) + 0.5) / size - 0.5
    row = np.exp(-0.5 * (offsets / SIGMA) ** 2)
    return np.outer(row, row).astype(np.float32)


def upsample_and_label(
    probabilities: NDArray[np.float32], height: int, width: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Upsample bilinearly with half-pixel centres, and take the most probable class.

    Works strip by strip and class by class: C x H x W is never in memory.

    Args:
        probabilities: (C, h, w) float32 in [0, 255].
        height: rows of the image, at most h * LOW_RES_STRIDE.
        width: columns of the image, at most w * LOW_RES_STRIDE.

    Returns:
        labels: (height, width) uint8, 1..C.
        confidence: (height, width) uint8, 255 = 1.0.
    """
    labels = np.empty((height, width), np.uint8)
    confidence = np.empty((height, width), np.uint8)
    for top in range(0, probabilities.shape[1], _STRIP_ROWS):
        bottom = min(top + _STRIP_ROWS, probabilities.shape[1])
        rows = slice(top * LOW_RES_STRIDE, min(bottom * LOW_RES_STRIDE, height))
        best = _upsample_rows(probabilities[0], top, bottom)
        winner = np.ones(best.shape, np.uint8)
        for index in range(1, len(probabilities)):
            candidate = _upsample_rows(probabilities[index], top, bottom)
            winner[candidate > best] = index + 1
            np.maximum(best, candidate, out=best)
        kept = rows.stop - rows.start
        labels[rows] = winner[:kept, :width]
        confidence[rows] = np.rint(best[:kept, :width]).clip(0, 255)
    return labels, confidence


def _upsample_rows(plane: NDArray[np.float32], top: int, bottom: int) -> NDArray[np.float32]:
    """Rows `top` to `bottom` of an (h, w) plane, LOW_RES_STRIDE times larger both ways.

    One more row on each side goes in, for the interpolation across the strip's edges. Pillow's
    bilinear filter, when it enlarges, is the half-pixel interpolation with clamped edges.
    """
    first, last = max(top - 1, 0), min(bottom + 1, plane.shape[0])
    width = plane.shape[1]
    enlarged = Image.fromarray(plane[first:last]).resize(
        (width * LOW_RES_STRIDE, (bottom - top) * LOW_RES_STRIDE),
        Image.Resampling.BILINEAR,
        box=(0, top - first, width, bottom - first),
    )
    return np.array(enlarged, np.float32)


def _predict_one_tile(image: NDArray[np.uint8], backend: Backend, tile: int) -> Prediction:
    height, width = image.shape[:2]
    padded = pad_by_reflection(image, tile, tile)
    outputs = backend.infer(padded[None], ("labels", "confidence", "iou_scores"))
    return Prediction(
        labels=np.ascontiguousarray(outputs["labels"][0, :height, :width]),
        confidence=np.ascontiguousarray(outputs["confidence"][0, :height, :width]),
        iou_scores=outputs["iou_scores"][0],
    )


def _whole(length: int) -> int:
    """`length` rounded up to the decoder's grid."""
    return math.ceil(length / LOW_RES_STRIDE) * LOW_RES_STRIDE


class _Blend:
    """Sums of windowed tiles at the decoder's resolution: 4 C bytes for 16 pixels of the image."""

    def __init__(self, num_classes: int, height: int, width: int, tile: int) -> None:
        shape = (height // LOW_RES_STRIDE, width // LOW_RES_STRIDE)
        self._window = gaussian_window(tile // LOW_RES_STRIDE)
        self._sums = np.zeros((num_classes, *shape), np.float32)  # C x h x w
        self._weights = np.zeros(shape, np.float32)  # h x w
        self._iou_scores: list[NDArray[np.float32]] = []  # N times C
        self._areas: list[NDArray[np.float64]] = []  # N times C

    def add(
        self,
        origin: tuple[int, int],
        probabilities: NDArray[np.uint8],
        iou_scores: NDArray[np.float32],
    ) -> None:
        """Add one tile: (C, T/4, T/4) uint8 and (C,) float32."""
        y, x = (pixel // LOW_RES_STRIDE for pixel in origin)
        place = (slice(y, y + len(self._window)), slice(x, x + len(self._window)))
        self._sums[:, *place] += self._window * probabilities
        self._weights[place] += self._window
        self._iou_scores.append(iou_scores)
        self._areas.append(probabilities.sum(axis=(1, 2), dtype=np.float64))

    def probabilities(self) -> NDArray[np.float32]:
        """The blend, (C, h, w) float32 in [0, 255]; ends the summing."""
        self._sums /= self._weights
        return self._sums

    def iou_scores(self) -> NDArray[np.float32]:
        """Mean of the tiles' scores, (C,) float32, each class weighted by its area in the tile.

        The area is the sum of its probabilities: a tile without the class has little to say of it.
        """
        areas = np.stack(self._areas)  # N x C
        areas[:, areas.sum(axis=0) == 0] = 1.0
        return np.average(self._iou_scores, axis=0, weights=areas).astype(np.float32)
