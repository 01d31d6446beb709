"""The labels as a pyramidal OME-TIFF with the classes' colours, for QuPath and Bio-Formats."""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from serve.slides.outputs.format import SlideFormat, SlideResult

_TILE = 512
_TIFF_UM_PER_CM = 1e4


def write_ome_tiff(result: SlideResult, path: Path) -> None:
    """Write all levels, tile by tile."""
    size, (step_y, step_x) = result.plan.slide.pixel_size, result.plan.level0_px_per_cell
    um = {"X": size.x * step_x, "Y": size.y * step_y}
    options: dict[str, Any] = {
        "dtype": np.uint8,
        "tile": (_TILE, _TILE),
        "photometric": "palette",
        "colormap": np.ascontiguousarray(result.colors.T * np.uint16(257)),
        "compression": "zlib",
        "resolutionunit": "CENTIMETER",
    }
    metadata = {
        "axes": "YX",
        "Name": result.name,
        "UUID": str(uuid.uuid5(uuid.NAMESPACE_URL, result.plan.key)),  # the same at each writing
        "PhysicalSizeX": um["X"],
        "PhysicalSizeXUnit": "\u00b5m",
        "PhysicalSizeY": um["Y"],
        "PhysicalSizeYUnit": "\u00b5m",
        "Description": _description(result),
    }
    with tifffile.TiffWriter(path, bigtiff=True, ome=True) as tiff:
        for level in range(result.num_levels):
            shape = result.labels(level).shape
            per_cm = tuple(_TIFF_UM_PER_CM / (um[axis] * 2**level) for axis in "XY")
            first: dict[str, Any] = (
                {"subifds": result.num_levels - 1, "metadata": metadata}
                if level == 0
                else {"subfiletype": 1, "metadata": None}
            )
            tiff.write(
                _tiles(result, level),
                shape=shape,
                resolution=per_cm,
                **options,
                **first,
            )


def _description(result: SlideResult) -> str:
    """The labels' names and the map's place; XML allows no control characters."""
    x, y = result.summary.origin_px
    names = (f"{label} {one.name}" for label, one in enumerate(result.plan.model.classes, 1))
    text = "; ".join([*names, f"origin x {x:g}, y {y:g} px of the slide's level 0"])
    return "".join(one if one.isprintable() else " " for one in text)


def _tiles(result: SlideResult, level: int) -> Iterator[NDArray[np.uint8]]:
    """The tiles of a level, row by row; a row of shards' chunks is read at once."""
    labels = result.labels(level)
    height, width = labels.shape
    for top in range(0, height, _TILE):
        rows = np.asarray(labels[top : top + _TILE])
        padded = np.zeros((_TILE, -(-width // _TILE) * _TILE), np.uint8)
        padded[: rows.shape[0], :width] = rows
        for left in range(0, width, _TILE):
            yield np.ascontiguousarray(padded[:, left : left + _TILE])


OME_TIFF = SlideFormat(
    name="ome-tiff",
    title="OME-TIFF",
    description="the labels as a pyramidal OME-TIFF with the classes' colours",
    file="{name}.labels.ome.tif",
    media_type="image/tiff",
    write=write_ome_tiff,
)
