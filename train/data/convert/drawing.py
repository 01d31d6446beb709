"""Draws a slide's annotations as labels, chunk by chunk, at the tiles' um per pixel."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from serve.images.readers.reader import RegionReader
from train.data.convert.class_mapping import ROI, ClassMapping
from train.data.convert.shapes import Annotation, Ring, area_of, fill_shape, vanished

_CHUNK_TILES = 4
"""Tiles along each side of what is in memory at once (our choice)."""
_Drawn = tuple[str, int, tuple[Ring, ...]]
"""Name, label and rings of an area."""


def _told(text: str) -> list[str]:
    return field(default_factory=list, metadata={"text": text})


@dataclass
class Lost:
    """What does not arrive in the data set as meant, by its kind, and how to warn of each."""

    other_mpp: list[str] = _told(
        "slides, such as {}, state another um per pixel than --source-mpp. Theirs counts."
    )
    beyond: list[str] = _told(
        "areas, such as {}, reach far beyond their slide. Are they of another slide, or drawn at "
        "another scale?"
    )
    hidden: list[str] = _told(
        "areas, such as {}, are completely covered by later ones. To draw smaller areas on top, "
        "use --overlap area."
    )
    outside: list[str] = _told(
        "areas, such as {}, lie outside of the regions of interest of their slide, so nothing is "
        "left of them. Draw regions around them, or map their label to ignore."
    )
    tiny: list[str] = _told(
        "areas, such as {}, are smaller than a pixel of the tiles, so nothing is left of them. "
        "Remove them, or choose a smaller --mpp."
    )
    slides: list[str] = _told(
        "slides, such as {}, give no tile: nothing of them is labelled. Draw areas, or set "
        "uncovered in the mapping."
    )

    def warnings(self) -> list[str]:
        """One sentence per kind of loss."""
        found = [(getattr(self, kind.name), kind.metadata["text"]) for kind in fields(self)]
        return [f"{len(names)} {text.format(names[0])}" for names, text in found if names]


@dataclass(frozen=True, eq=False)
class Drawing:
    """What is drawn on a slide, in pixels of the tiles' um per pixel."""

    rois: list[tuple[Ring, ...]]
    """Regions of interest; without any, the whole slide is one."""
    shapes: list[_Drawn]
    """In the order of drawing."""
    size: tuple[int, int]
    """Rows and columns of the slide."""
    uncovered: int
    """The label of what no shape covers. Without regions of interest, one that is a class makes the
    whole slide be drawn."""

    def draw(self, tile: int, lost: Lost) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
        """Yield y, x and the labels (height, width) uint8 of each chunk that has a label.

        Args:
            tile: side of a tile in pixels.
            lost: gets the names of shapes that reach no pixel, of those that others cover, and of
                those that lie outside of all regions of interest.
        """
        names: set[str] = set()
        reached: set[str] = set()
        shown: set[str] = set()
        kept: set[str] = set()
        for y, x, height, width in self._chunks(tile):
            labels = np.full((height, width), self.uncovered, np.uint8)
            shapes = self._touching(y, x, height, width)
            here = {name for name, value, rings in shapes if fill_shape(labels, rings, value)}
            names |= {name for name, _, _ in shapes}
            reached |= here
            visible = here - set(vanished(shapes, labels))
            shown |= visible
            if self.rois:
                inside = np.zeros((height, width), np.uint8)
                for rings in self.rois:
                    fill_shape(inside, tuple(ring - [x, y] for ring in rings), 1)
                labels[inside == 0] = 0
                visible -= set(vanished(shapes, labels))
            kept |= visible
            if labels.any():
                yield y, x, labels
        lost.hidden += sorted(reached - shown)
        lost.tiny += sorted(names - reached)
        if self.rois:
            elsewhere = {name for name, value, _ in self.shapes if value} - names
            lost.outside += sorted(elsewhere | (shown - kept))

    def _chunks(self, tile: int) -> Iterator[tuple[int, int, int, int]]:
        """(y, x, height, width) of what is read at once, where something is drawn."""
        side = tile * _CHUNK_TILES
        rows, columns = self.size
        outlines = [rings[0] for rings in self.rois] or [rings[0] for _, _, rings in self.shapes]
        if self.uncovered and not self.rois:
            outlines = [np.array([[0, 0], [columns, rows]], np.float64)]
        if not outlines:
            return
        low = np.min([ring.min(axis=0) for ring in outlines], axis=0)
        high = np.max([ring.max(axis=0) for ring in outlines], axis=0)
        left, top = (max(0, int(np.floor(edge))) for edge in low)
        right, bottom = min(columns, int(np.ceil(high[0]))), min(rows, int(np.ceil(high[1])))
        if rows <= side and columns <= side:  # a small image is taken as it is
            left, top, right, bottom = 0, 0, columns, rows
        for y, y_end in _spans(top, bottom, side):
            for x, x_end in _spans(left, right, side):
                yield y, x, y_end - y, x_end - x

    def _touching(self, y: int, x: int, height: int, width: int) -> list[_Drawn]:
        """The shapes whose boxes reach a chunk, in its pixels."""
        found = []
        for name, value, rings in self.shapes:
            low, high = rings[0].min(axis=0) - [x, y], rings[0].max(axis=0) - [x, y]
            if high[0] > 0 and high[1] > 0 and low[0] < width and low[1] < height:
                found.append((name, value, tuple(ring - [x, y] for ring in rings)))
        return found


def _spans(start: int, end: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut a length into the fewest parts of about one length: none is a narrow rest."""
    length = max(0, end - start)
    num = max(1, -(-length // most))
    return pairwise(start + length * part // num for part in range(num + 1))


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
    shapes: list[_Drawn] = []
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
    return Drawing(rois, shapes, size, mapping.index(mapping.uncovered))
