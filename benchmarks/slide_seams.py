"""Measures the seams between tiles, for several overlaps.

Counts how often neighbouring cells have different labels: across the lines of tiles (where a tile
begins, where one ends, and the middle of an overlap), and across all other lines between the
encoder's patches, whose edges show in every answer. Without seams, both shares are equal. Images
are cropped so that a whole number of tiles fits, and tiles lie on the grid of patches.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serve.contract.manifest import LOW_RES_STRIDE, Manifest
from serve.contract.strict import Strict
from serve.images.tiles import Blend, pad_to_tiles, tile_origins
from serve.inference.batching import TileRunner

PATCH_CELLS = 4
"""Cells along one of SAM's patches of 16 pixels."""


class Seams(Strict):
    """The cost of one overlap, and its seams."""

    overlap: float
    num_tiles: int
    on_lines: dict[str, float]
    """Share of neighbouring cells with different labels, by the kind of line."""
    elsewhere: float
    ratio: float
    """The worst kind of line divided by `elsewhere`."""
    same_as_reference: float
    """Share of cells with the same label as with an overlap of half a tile."""


def measure_seams(
    images: Sequence[NDArray[np.uint8]],
    runner: TileRunner,
    manifest: Manifest,
    overlaps: Sequence[float],
) -> list[Seams]:
    """Segment images with several overlaps, and count label changes."""
    reference = [segment(image, runner, manifest, 0.5)[0] for image in images]
    found = []
    for overlap in overlaps:
        changes: dict[str, list[NDArray[np.bool_]]] = {}
        num_tiles = same = cells = 0
        for image, expected in zip(images, reference, strict=True):
            cut = _whole_steps(image, manifest.tile_size_px, overlap)
            labels, count = segment(cut, runner, manifest, overlap)
            num_tiles += count
            same += int((labels == expected[: labels.shape[0], : labels.shape[1]]).sum())
            cells += labels.size
            for axis in (0, 1):
                for kind, differ in _changes(labels, axis, manifest.tile_size_px, overlap):
                    changes.setdefault(kind, []).append(differ)
        shares = {
            kind: float(np.concatenate(parts, axis=None).mean()) for kind, parts in changes.items()
        }
        elsewhere = shares.pop("elsewhere")
        found.append(
            Seams(
                overlap=overlap,
                num_tiles=num_tiles,
                on_lines=shares,
                elsewhere=elsewhere,
                ratio=max(shares.values()) / elsewhere,
                same_as_reference=same / cells,
            )
        )
    return found


def segment(
    image: NDArray[np.uint8], runner: TileRunner, manifest: Manifest, overlap: float
) -> tuple[NDArray[np.uint8], int]:
    """Segment an image; returns the labels of its cells, (h, w) uint8, and the number of tiles."""
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
        tiles = np.stack([padded[y : y + tile, x : x + tile] for y, x in some])
        answers = runner.infer(tiles, ("low_res_probabilities", "iou_scores"))
        for place, probabilities, scores in zip(some, *answers.values(), strict=True):
            blend.add(place, probabilities, scores)
    rows, columns = (-(-length // LOW_RES_STRIDE) for length in image.shape[:2])
    labels = blend.probabilities().argmax(axis=0)[:rows, :columns]
    return labels.astype(np.uint8), len(places)


def _whole_steps(image: NDArray[np.uint8], tile: int, overlap: float) -> NDArray[np.uint8]:
    """Crop an image to a whole number of steps between tiles."""
    step = int(tile * (1 - overlap))
    height, width = (tile + (length - tile) // step * step for length in image.shape[:2])
    return image[:height, :width]


def _changes(
    labels: NDArray[np.uint8], axis: int, tile: int, overlap: float
) -> list[tuple[str, NDArray[np.bool_]]]:
    """Whether neighbours along an axis differ, per kind of line between them."""
    along = labels if axis == 0 else labels.T
    differ = along[1:] != along[:-1]  # row i: between cells i and i + 1
    length = labels.shape[axis] * LOW_RES_STRIDE
    origins = [y // LOW_RES_STRIDE for y in tile_origins(length, tile, overlap)]
    side = tile // LOW_RES_STRIDE
    lines: dict[str, set[int]] = {"begin": set(), "end": set(), "middle": set()}
    for first, second in zip(origins, origins[1:], strict=False):
        lines["begin"].add(second - 1)
        lines["end"].add(first + side - 1)
        lines["middle"].add((second + first + side) // 2 // PATCH_CELLS * PATCH_CELLS - 1)
    special = set().union(*lines.values())
    others = [row for row in range(PATCH_CELLS - 1, len(differ), PATCH_CELLS) if row not in special]
    return [
        *((kind, differ[sorted(rows)]) for kind, rows in lines.items() if rows),
        ("elsewhere", differ[others]),
    ]
