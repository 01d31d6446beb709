"""Tiles of a result: labels and confidence out of its OME-Zarr pyramid."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import zarr
from numpy.typing import NDArray
from PIL import Image, ImageColor

from serve.contract.errors import NotFoundError
from serve.slides.damage import ZARR_ERRORS
from serve.slides.store import CONFIDENCE, LABELS, array_of

CELL_TILE = 256
"""Side of a tile, in cells of its level."""


def cells_npz(store: Path, level: int, column: int, row: int) -> bytes:
    """A tile as .npz, as `/arrays` writes it: `labels` and `confidence`, (h, w) uint8.

    Raises:
        NotFoundError: there is no such tile, or the result cannot be read.
    """
    buffer = io.BytesIO()
    labels = _cut(store, LABELS, level, column, row)
    confidence = _cut(store, CONFIDENCE, level, column, row)
    np.savez_compressed(buffer, labels=labels, confidence=confidence)
    return buffer.getvalue()


def cells_png(
    store: Path,
    level: int,
    column: int,
    row: int,
    *,
    colors: Sequence[str],
    shown: Sequence[int],
) -> bytes:
    """The labels of a tile as a PNG with a palette: an index is a label, 0 is transparent.

    Args:
        store: the OME-Zarr group.
        level: of the pyramid, 0 the finest.
        column: of the tile.
        row: of the tile.
        colors: of the classes, from label 1.
        shown: labels that are not transparent.

    Raises:
        NotFoundError: there is no such tile, or the result cannot be read.
    """
    labels = _cut(store, LABELS, level, column, row)
    picture = Image.fromarray(labels)
    palette = [0, 0, 0]
    for color in colors:
        palette += ImageColor.getrgb(color)[:3]
    picture.putpalette(palette)
    alpha = bytes(255 if label in shown else 0 for label in range(len(colors) + 1))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", transparency=alpha)
    return buffer.getvalue()


def _cut(store: Path, name: str, level: int, column: int, row: int) -> NDArray[np.uint8]:
    top, left = row * CELL_TILE, column * CELL_TILE
    try:
        array = array_of(zarr.open_group(store, mode="r"), f"{name[:-1]}{level}")
        inside = 0 <= top < array.shape[0] and 0 <= left < array.shape[1]
        cells = (
            np.asarray(array[top : top + CELL_TILE, left : left + CELL_TILE]) if inside else None
        )
    except KeyError as error:
        raise NotFoundError(f"The result has no level {level}. 0 is the finest.") from error
    except (OSError, *ZARR_ERRORS) as error:
        raise NotFoundError(
            f"The result in {store.name} cannot be read. Segment the slide again.",
            code="result_damaged",
        ) from error
    if cells is None or level < 0:
        raise NotFoundError(f"Level {level} of the result has no tile {column}_{row}.")
    return cells
