"""OME-Zarr 0.5: the confidence as the image, the labels as its label image, both as pyramids.

https://ngff.openmicroscopy.org/0.5. Each level takes every second cell of the level before: a
label is not averaged, and the confidence stays that of the label.
"""

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import zarr
from numpy.typing import NDArray

from serve.slides.outputs.format import SlideFormat, SlideResult
from serve.slides.store import CONFIDENCE, LABELS, array_of, create_array

_VERSION = "0.5"
_Level: TypeAlias = "zarr.Array[Any] | NDArray[np.uint8]"


def write_ome_zarr(result: SlideResult, path: Path) -> None:
    """Complete the group that the blocks were written to with its pyramid and its metadata."""
    assert path == result.store
    group = zarr.open_group(path, mode="r+")
    for name in (LABELS, CONFIDENCE):
        finer: _Level = array_of(group, name)
        for level in range(1, result.num_levels):
            finer = _halve(group, finer, f"{name[:-1]}{level}", result)
    labels = _group(group, "labels")
    classes = _group(labels, "classes")
    classes.attrs["ome"] = _multiscale(result, "classes") | {"image-label": _label_colors(result)}
    labels.attrs["ome"] = {"version": _VERSION, "labels": ["classes"]}
    group.attrs["ome"] = _multiscale(result, "confidence")
    group.attrs["focalpath"] = {
        "origin_px": list(result.summary.origin_px),
        "origin": "x and y of the corner, in pixels of the slide's level 0",
        "level0_px_per_cell": list(result.plan.level0_px_per_cell[::-1]),
        "model": result.summary.model.model_dump(),
    }


def _halve(group: zarr.Group, finer: _Level, target: str, result: SlideResult) -> _Level:
    """Write a level shard by shard, from the level before.

    Returns:
        The level; in memory if it is one shard.
    """
    shape = (-(-finer.shape[0] // 2), -(-finer.shape[1] // 2))
    side = result.plan.settings.block_cells
    coarser = create_array(group, target, shape, side)
    for top in range(0, shape[0], side):
        for left in range(0, shape[1], side):
            part = np.asarray(finer[2 * top : 2 * (top + side), 2 * left : 2 * (left + side)])
            half = part[::2, ::2]
            coarser[top : top + half.shape[0], left : left + half.shape[1]] = half
    return half if half.shape == shape else coarser


def _multiscale(result: SlideResult, name: str) -> dict[str, Any]:
    """The metadata of one pyramid, in um from the corner of level 0 of the slide."""
    plan = result.plan
    sides = plan.slide.pixel_size.y, plan.slide.pixel_size.x
    um = [side * step for side, step in zip(sides, plan.level0_px_per_cell, strict=True)]
    corner = [side * origin for side, origin in zip(sides, plan.origin_px, strict=True)]
    datasets = []
    for level in range(result.num_levels):
        # Cell 0 of every level is that of the finest: its middle is half a cell from the corner.
        datasets.append(
            {
                "path": str(level),
                "coordinateTransformations": [
                    {"type": "scale", "scale": [side * 2**level for side in um]},
                    {
                        "type": "translation",
                        "translation": [
                            start + side / 2 for start, side in zip(corner, um, strict=True)
                        ],
                    },
                ],
            }
        )
    axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"]
    return {
        "version": _VERSION,
        "multiscales": [{"name": name, "axes": axes, "datasets": datasets, "type": "nearest"}],
    }


def _label_colors(result: SlideResult) -> dict[str, Any]:
    classes = list(enumerate(result.plan.model.classes, start=1))
    return {
        "colors": [
            {"label-value": 0, "rgba": [0, 0, 0, 0]},
            *({"label-value": label, "rgba": [*tissue.rgb, 255]} for label, tissue in classes),
        ],
        "properties": [
            {"label-value": 0, "class": "outside of the tissue"},
            *({"label-value": label, "class": tissue.name} for label, tissue in classes),
        ],
        "source": {"image": "../../"},
    }


def _group(parent: zarr.Group, name: str) -> zarr.Group:
    found = parent[name]
    assert isinstance(found, zarr.Group), name
    return found


OME_ZARR = SlideFormat(
    name="ome-zarr",
    title="OME-Zarr",
    description="labels and confidence at every scale, for programs (version 0.5)",
    file="{name}.ome.zarr",
    media_type="application/vnd+zarr",
    write=write_ome_zarr,
)
