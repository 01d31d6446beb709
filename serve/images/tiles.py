"""Where the tiles of an image lie, and how their answers become one: numpy alone.

Shape legend: H, W: the image; T: tile size; C: classes; N: tiles; h, w: H/4, W/4 of the padded
image, the decoder's resolution.

Training scores whole images with these functions, serving answers with them: both see the same
tiles at the same um per pixel, and blend them in the same way.

Tiles overlap. What is blended is the decoder's probabilities, weighted by a Gaussian window, so
that a tile counts most where it has seen the most context; the blend is then upsampled bilinearly
with half-pixel centres, as SAM upsamples its masks (`align_corners=False`).
"""

import functools
import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.contract.errors import ImageTooLargeError
from serve.contract.machine import usable_cpus
from serve.contract.manifest import LOW_RES_STRIDE
from serve.images.mpp import Mpp, sides_of

OVERLAP = 0.25
"""Share of a tile, along each axis, that it has in common with the next one, at least."""
SIGMA = 0.125
"""Standard deviation of the Gaussian window, as a share of the tile."""
SAME_MPP = 0.02
"""An image whose um per pixel is within this share of the model's is not resampled (our choice)."""
MAX_ENLARGEMENT = 4.0
"""Largest factor by which an image may be enlarged to the model's um per pixel (our choice): two
steps of objectives, as from 10x to 40x. Beyond it, the image lacks the detail that the model looks
for."""
_STRIP_ROWS = 256
"""Rows of the image that are upsampled at once: bounds the memory. Part of the result: of another
size, the interpolation rounds differently."""
_MOST_STRIPS = 4
"""Strips that are worked on at the same time: bounds the memory."""


Scale = tuple[float, float]
"""Pixels at the model's um per pixel for one of the image, along (y, x)."""
UNSCALED: Scale = (1.0, 1.0)


def scale_to(model_mpp: float | None, image_mpp: Mpp | None) -> Scale:
    """Pixels at the model's um per pixel for one of the image.

    `UNSCALED` where one of them is not known, and where they differ by no more than `SAME_MPP`
    along both axes.
    """
    if model_mpp is None or image_mpp is None:
        return UNSCALED
    sides = sides_of(image_mpp)
    if all(abs(side / model_mpp - 1) <= SAME_MPP for side in sides):
        return UNSCALED
    return sides.y / model_mpp, sides.x / model_mpp


def check_enlargement(model_mpp: float | None, image_mpp: Mpp | None, what: str) -> None:
    """Refuse an image or slide that lacks the detail that a model looks for.

    Args:
        model_mpp: um per pixel at which it is wanted.
        image_mpp: its own.
        what: names it, for the error.

    Raises:
        ImageTooLargeError: it would be enlarged more than `MAX_ENLARGEMENT` times.
    """
    enlarged = max(scale_to(model_mpp, image_mpp))
    if enlarged > MAX_ENLARGEMENT:
        raise ImageTooLargeError(
            f"At {sides_of(image_mpp or 0.0)} um per pixel, for the model's {model_mpp:g}, {what} "
            f"would be enlarged {enlarged:.3g} times, expected at most {MAX_ENLARGEMENT:g}: "
            "enlarging adds none of the detail that the model was trained on. Scan it at a higher "
            "magnification, or correct its um per pixel.",
            code="enlarged_too_far",
        )


def scaled_size(height: int, width: int, scale: Scale) -> tuple[int, int]:
    """Rows and columns of an image at the model's um per pixel."""
    return max(round(height * scale[0]), 1), max(round(width * scale[1]), 1)


def resample(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Resize an (H, W, 3) uint8 image; smooths as far as it becomes smaller."""
    if image.shape[:2] == (height, width):
        return image
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def cut_tiles(image: NDArray[np.uint8], tile: int) -> NDArray[np.uint8]:
    """The (N, tile, tile, 3) tiles that an image at the model's um per pixel is cut into."""
    return np.stack([tile_pixels for _, tile_pixels in cut(pad_to_tiles(image, tile), tile)])


def padded_size(height: int, width: int, tile: int) -> tuple[int, int]:
    """Rows and columns of an image once padded to the decoder's grid, and to a tile at least."""
    return max(_whole(height), tile), max(_whole(width), tile)


def num_tiles(height: int, width: int, tile: int) -> int:
    """How many tiles an image at the model's um per pixel is cut into: what it costs to segment."""
    rows, columns = (len(tile_origins(length, tile)) for length in padded_size(height, width, tile))
    return rows * columns


def pad_to_tiles(image: NDArray[np.uint8], tile: int) -> NDArray[np.uint8]:
    """Pad an image to the decoder's grid, and to a tile at least."""
    return pad_by_reflection(image, *padded_size(image.shape[0], image.shape[1], tile))


def cut(
    padded: NDArray[np.uint8], tile: int
) -> Iterator[tuple[tuple[int, int], NDArray[np.uint8]]]:
    """Each tile's (y, x) and its pixels."""
    for y, x in tile_places(padded.shape[0], padded.shape[1], tile):
        yield (y, x), padded[y : y + tile, x : x + tile]


def tile_places(height: int, width: int, tile: int) -> list[tuple[int, int]]:
    """The (y, x) of each tile of a padded image, row by row."""
    return list(itertools.product(tile_origins(height, tile), tile_origins(width, tile)))


def tile_origins(length: int, tile: int, overlap: float = OVERLAP) -> list[int]:
    """Where tiles start along an axis: evenly spread, from edge to edge, on the decoder's grid.

    Args:
        length: pixels of the axis, at least `tile`; both are multiples of LOW_RES_STRIDE.
        tile: pixels of a tile.
        overlap: share of a tile that it has in common with the next one, at least.
    """
    assert length >= tile
    assert length % LOW_RES_STRIDE == tile % LOW_RES_STRIDE == 0
    cells = (length - tile) // LOW_RES_STRIDE
    largest_step = max(int(tile * (1 - overlap)) // LOW_RES_STRIDE, 1)
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
    probabilities: NDArray[np.float32],
    height: int,
    width: int,
    extent: tuple[float, float] | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Resample bilinearly with half-pixel centres, and take the most probable class.

    Works strip by strip and class by class: C x H x W is never in memory.

    Args:
        probabilities: (C, h, w) float32 in [0, 255].
        height: rows of the image.
        width: columns of the image.
        extent: rows and columns of the probabilities that the image is as large as; by default
            those at LOW_RES_STRIDE.

    Returns:
        labels: (height, width) uint8, 1..C.
        confidence: (height, width) uint8, 255 = 1.0.
    """
    rows, columns = extent or (height / LOW_RES_STRIDE, width / LOW_RES_STRIDE)
    labels = np.empty((height, width), np.uint8)
    confidence = np.empty((height, width), np.uint8)

    def label_strip(top: int) -> None:
        bottom = min(top + _STRIP_ROWS, height)
        span = top * rows / height, bottom * rows / height
        winner = labels[top:bottom]
        winner[...] = 1
        best = _resample_rows(probabilities[0], span, bottom - top, width, columns).copy()
        for index in range(1, len(probabilities)):
            candidate = _resample_rows(probabilities[index], span, bottom - top, width, columns)
            np.copyto(winner, np.uint8(index + 1), where=candidate > best)
            np.maximum(best, candidate, out=best)
        np.clip(np.rint(best, out=best), 0, 255, out=best)
        confidence[top:bottom] = best

    list(_strip_threads().map(label_strip, range(0, height, _STRIP_ROWS)))
    return labels, confidence


@functools.cache
def _strip_threads() -> ThreadPoolExecutor:
    """Pillow and numpy leave Python to other threads while they compute."""
    num_threads = min(usable_cpus(), _MOST_STRIPS)
    return ThreadPoolExecutor(num_threads, thread_name_prefix="strips")


def _resample_rows(
    plane: NDArray[np.float32], span: tuple[float, float], height: int, width: int, columns: float
) -> NDArray[np.float32]:
    """Rows `span` and the first `columns` of an (h, w) plane as (height, width).

    Some more rows on each side go in, for the interpolation across the strip's edges. Pillow's
    bilinear filter, when it enlarges, is the half-pixel interpolation with clamped edges; when it
    makes smaller, it averages.
    """
    top, bottom = span
    margin = max((bottom - top) / height, 1) + 1
    first = max(math.floor(top - margin), 0)
    last = min(math.ceil(bottom + margin), plane.shape[0])
    resampled = Image.fromarray(plane[first:last]).resize(
        (width, height),
        Image.Resampling.BILINEAR,
        box=(0, top - first, min(columns, plane.shape[1]), min(bottom, plane.shape[0]) - first),
    )
    return np.asarray(resampled, np.float32)


def _whole(length: int) -> int:
    """`length` rounded up to the decoder's grid."""
    return math.ceil(length / LOW_RES_STRIDE) * LOW_RES_STRIDE


class Blend:
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
