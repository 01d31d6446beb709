"""Seams of tiles in a segmentation: see `benchmarks.slide_seams`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.contract.manifest import LOW_RES_STRIDE, Manifest
from serve.contract.strict import Strict
from serve.images.tiles import Blend, pad_to_tiles, tile_origins
from serve.inference.batching import TileRunner

PATCH_PX = 16
NUM_GRIDS = 4
"""Grids along the diagonal of a step between tiles."""
DISTANCES = (2, 4, 8, 16)
"""Cells from the nearest line of tiles, at which the bins of distances end."""


class Seams(Strict):
    """The cost of one overlap, and its seams."""

    overlap: float
    tiles_per_area: float
    """How many times an image's area is run."""
    changes: dict[str, float]
    """By the kind of line: label changes across it, divided by those at the same places without."""
    ratio: float
    """Of the worst kind."""
    unlike_others: dict[str, float]
    """By the distance to the nearest line, in cells: the share of cells whose label is not that of
    most other grids."""


@dataclass(frozen=True)
class _Grid:
    """The labels of one position of the tiles, in the frame that all positions share."""

    labels: NDArray[np.uint8]
    lines: tuple[dict[str, NDArray[np.int64]], ...]
    """Per axis and kind: the cells after which lines run."""


def measure_seams(
    images: Sequence[NDArray[np.uint8]],
    runner: TileRunner,
    manifest: Manifest,
    overlaps: Sequence[float],
) -> list[Seams]:
    """Segment images with several overlaps, and count label changes.

    Args:
        images: (H, W, 3) uint8 RGB at the model's um per pixel, of a few tiles each.
        runner: the model.
        manifest: of the model.
        overlaps: shares of a tile; steps between tiles are rounded to the encoder's patches.
    """
    return [
        _measure([_grids(image, runner, manifest, overlap) for image in images], manifest, overlap)
        for overlap in overlaps
    ]


def _measure(images: Sequence[list[_Grid]], manifest: Manifest, overlap: float) -> Seams:
    crossing: dict[str, list[NDArray[np.bool_]]] = {}
    same_places: dict[str, list[NDArray[np.bool_]]] = {}
    near: dict[str, list[NDArray[np.bool_]]] = {}
    for grids in images:
        for index, grid in enumerate(grids):
            others = [*grids[:index], *grids[index + 1 :]]
            for axis in (0, 1):
                for kind, at in grid.lines[axis].items():
                    crossing.setdefault(kind, []).append(_differ(grid, axis, at))
                    for other in others:
                        free = np.setdiff1d(at, np.concatenate([*other.lines[axis].values()]))
                        same_places.setdefault(kind, []).append(_differ(other, axis, free))
            unlike = grid.labels != _most_frequent([other.labels for other in others])
            for name, mask in _by_distance(grid):
                near.setdefault(name, []).append(unlike[mask])
    changes = {kind: _share(crossing[kind]) / _share(same_places[kind]) for kind in crossing}
    tile = manifest.tile_size_px
    return Seams(
        overlap=overlap,
        tiles_per_area=(tile / _step(tile, overlap)) ** 2,
        changes=changes,
        ratio=max(changes.values()),
        unlike_others={
            name: _share(parts) for name, parts in near.items() if any(part.size for part in parts)
        },
    )


def _grids(
    image: NDArray[np.uint8], runner: TileRunner, manifest: Manifest, overlap: float
) -> list[_Grid]:
    """The labels of an image with its tiles at several places, cropped to what all grids have."""
    tile = manifest.tile_size_px
    step = _step(tile, overlap)
    starts = sorted(
        {index * step // NUM_GRIDS // PATCH_PX * PATCH_PX for index in range(NUM_GRIDS)}
    )
    first = starts[-1] // LOW_RES_STRIDE
    parts = [_whole_steps(image[start:, start:], tile, step) for start in starts]
    last = [
        min(start + part.shape[axis] for start, part in zip(starts, parts, strict=True))
        // LOW_RES_STRIDE
        for axis in (0, 1)
    ]
    grids = []
    for start, part in zip(starts, parts, strict=True):
        move = start // LOW_RES_STRIDE
        labels = segment(part, runner, manifest, 1 - step / tile)
        grids.append(
            _Grid(
                labels[first - move : last[0] - move, first - move : last[1] - move],
                tuple(
                    _lines(part.shape[axis], tile, step, first - move, last[axis] - first)
                    for axis in (0, 1)
                ),
            )
        )
    return grids


def segment(
    image: NDArray[np.uint8], runner: TileRunner, manifest: Manifest, overlap: float
) -> NDArray[np.uint8]:
    """Segment an image: the labels of its cells, (h, w) uint8, from 0."""
    tile = manifest.tile_size_px
    padded = pad_to_tiles(image, tile)
    blend = Blend(len(manifest.classes), padded.shape[0], padded.shape[1], tile)
    places = [
        (y, x)
        for y in tile_origins(padded.shape[0], tile, overlap)
        for x in tile_origins(padded.shape[1], tile, overlap)
    ]
    size = manifest.max_batch_size
    for start in range(0, len(places), size):
        some = places[start : start + size]
        outputs = ("low_res_probabilities", "iou_scores")
        asked = [runner.submit(padded[y : y + tile, x : x + tile], outputs) for y, x in some]
        for place, future in zip(some, asked, strict=True):
            blend.add(place, *(future.result()[name] for name in outputs))
    rows, columns = (-(-length // LOW_RES_STRIDE) for length in image.shape[:2])
    labels: NDArray[np.uint8] = blend.probabilities().argmax(axis=0).astype(np.uint8)
    return labels[:rows, :columns]


def _step(tile: int, overlap: float) -> int:
    """Pixels from one tile to the next, in whole patches."""
    return max(round(tile * (1 - overlap) / PATCH_PX), 1) * PATCH_PX


def _whole_steps(image: NDArray[np.uint8], tile: int, step: int) -> NDArray[np.uint8]:
    """Crop an image to a whole number of steps between tiles."""
    height, width = (tile + (length - tile) // step * step for length in image.shape[:2])
    return image[:height, :width]


def _lines(
    length: int, tile: int, step: int, first: int, num_cells: int
) -> dict[str, NDArray[np.int64]]:
    """By their kind, the cells of [first, first + num_cells) after which lines of tiles run."""
    begin = np.arange(step, length - tile + 1, step) // LOW_RES_STRIDE - 1
    end = begin + (tile - step) // LOW_RES_STRIDE
    patch = PATCH_PX // LOW_RES_STRIDE
    middle = (begin + end + 2) // 2 // patch * patch - 1
    kinds = {"begin": begin, "middle": middle, "end": end} if tile > step else {"begin": begin}
    lines = {}
    for kind, at in kinds.items():
        at = at - first
        lines[kind] = at[(at >= 0) & (at < num_cells - 1)]
    return lines


def _differ(grid: _Grid, axis: int, at: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether neighbours across some lines differ."""
    along = grid.labels if axis == 0 else grid.labels.T
    differ: NDArray[np.bool_] = along[at] != along[at + 1]
    return differ


def _most_frequent(labels: Sequence[NDArray[np.uint8]]) -> NDArray[np.int64]:
    """The label that most have, per cell."""
    counts = [
        sum((one == label).astype(np.int64) for one in labels)
        for label in range(max(int(one.max()) for one in labels) + 1)
    ]
    most: NDArray[np.int64] = np.argmax(np.stack(counts), axis=0)
    return most


def _by_distance(grid: _Grid) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Which cells lie how far from the nearest line in the middle of an overlap."""
    along = []
    for axis, length in enumerate(grid.labels.shape):
        lines = grid.lines[axis]
        at = lines.get("middle", lines["begin"])
        along.append(np.abs(np.arange(length)[:, None] - (at + 0.5)).min(axis=1))
    distance = np.minimum(along[0][:, None], along[1][None, :])
    low = 0
    for high in DISTANCES:
        yield f"{low} to {high}", (distance >= low) & (distance < high)
        low = high
    yield f"over {low}", distance >= low


def _share(parts: Sequence[NDArray[np.bool_]]) -> float:
    return float(np.concatenate(parts, axis=None).mean())
