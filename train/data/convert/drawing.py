"""Draws a slide's annotations as labels, chunk by chunk, at the tiles' um per pixel."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.images.readers.reader import RegionReader
from train.data.convert.class_mapping import ROI, UNLABELLED, ClassMapping
from train.data.convert.shapes import Annotation, Ring, area_of, fill_shape, vanished

_CHUNK_TILES = 4
"""Tiles along each side of what is in memory at once (our choice)."""
Drawn = tuple[str, int, tuple[Ring, ...]]
"""Name, label and rings of an area."""


@dataclass(frozen=True, eq=False)
class Drawing:
    """What is drawn on a slide, in pixels of the tiles' um per pixel."""

    rois: list[tuple[Ring, ...]]
    """Regions of interest; without any, the whole slide is one."""
    shapes: list[Drawn]
    """In the order of drawing."""
    size: tuple[int, int]
    """Rows and columns of the slide."""
    is_whole: bool
    """What nothing covers is a class, too, so that the whole slide is drawn."""

    def chunks(self, tile: int) -> Iterator[tuple[int, int, int, int]]:
        """(y, x, height, width) of what is read at once, where something is drawn."""
        side = tile * _CHUNK_TILES
        rows, columns = self.size
        outlines = [rings[0] for rings in self.rois] or [rings[0] for _, _, rings in self.shapes]
        if self.is_whole:
            outlines = [np.array([[0, 0], [columns, rows]], np.float64)]
        if not outlines:
            return
        low = np.min([ring.min(axis=0) for ring in outlines], axis=0)
        high = np.max([ring.max(axis=0) for ring in outlines], axis=0)
        left, top = (max(0, int(np.floor(edge))) for edge in low)
        right, bottom = min(columns, int(np.ceil(high[0]))), min(rows, int(np.ceil(high[1])))
        if rows <= side and columns <= side:  # a small image is taken as it is
            left, top, right, bottom = 0, 0, columns, rows
        for y in range(top, bottom, side):
            for x in range(left, right, side):
                yield y, x, min(side, bottom - y), min(side, right - x)

    def touching(self, corner: tuple[int, int], size: tuple[int, int]) -> list[Drawn]:
        """The shapes whose boxes reach a chunk, in its pixels.

        Args:
            corner: y and x of the chunk.
            size: its height and width.
        """
        y, x = corner
        found = []
        for name, value, rings in self.shapes:
            low, high = rings[0].min(axis=0) - [x, y], rings[0].max(axis=0) - [x, y]
            if high[0] > 0 and high[1] > 0 and low[0] < size[1] and low[1] < size[0]:
                found.append((name, value, tuple(ring - [x, y] for ring in rings)))
        return found

    def draw(
        self, mapping: ClassMapping, corner: tuple[int, int], size: tuple[int, int]
    ) -> tuple[NDArray[np.uint8], set[str], set[str]]:
        """Draw a chunk.

        Returns:
            its labels, (height, width) uint8; the names of the shapes that reach a pixel of it; and
            of these, those that others cover in it.
        """
        labels = np.full(size, mapping.index(mapping.uncovered), np.uint8)
        shapes = self.touching(corner, size)
        reached = {name for name, value, rings in shapes if fill_shape(labels, rings, value)}
        gone = set(vanished(shapes, labels))
        if self.rois:
            inside = np.zeros(size, np.uint8)
            for rings in self.rois:
                fill_shape(inside, tuple(ring - [corner[1], corner[0]] for ring in rings), 1)
            labels[inside == 0] = 0
        return labels, reached, gone


def drawing_of(
    annotations: Sequence[Annotation],
    file_name: str,
    reader: RegionReader,
    mapping: ClassMapping,
    mpp: float,
    *,
    smaller_on_top: bool,
) -> Drawing:
    """Bring a slide's annotations to the tiles' um per pixel, in the order of drawing.

    Args:
        annotations: in pixels of the slide's level 0.
        file_name: of the annotations, for their names.
        reader: of the slide.
        mapping: from labels to classes.
        mpp: um per pixel of the tiles.
        smaller_on_top: whether smaller areas are drawn over larger ones, not by the file's order.
    """
    scale = np.array(reader.require_pixel_size()) / mpp  # x, y
    rois: list[tuple[Ring, ...]] = []
    shapes: list[Drawn] = []
    for annotation in annotations:
        rings = tuple(ring * scale for ring in annotation.rings)
        value = mapping.value(annotation.label)
        if mapping.labels[annotation.label] == ROI:
            rois.append(rings)
        elif value is not None and rings:
            name = f"{annotation.label!r}, {annotation.place} of {file_name}"
            shapes.append((name, value, rings))
    if smaller_on_top:
        shapes.sort(key=lambda shape: -area_of(shape[2][0]))
    rows, columns = reader.height_px * scale[1], reader.width_px * scale[0]
    size = max(1, round(rows)), max(1, round(columns))
    is_whole = mapping.uncovered != UNLABELLED and not rois
    return Drawing(rois, shapes, size, is_whole)
