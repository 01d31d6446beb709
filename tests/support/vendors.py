"""A small slide in the layout of each vendor whose scanners' own files are not at hand.

Each shows the coordinate colours of its level 0, as far as it was scanned.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.images.readers.reader import Bounds
from tests.support.coordinates import coordinate_colors
from tests.support.dicom_slides import write_dicom_slide
from tests.support.hamamatsu import write_ndpi, write_vms, write_vmu
from tests.support.mirax import write_mirax
from tests.support.vendor_tiffs import (
    Area,
    Region,
    write_leica,
    write_philips,
    write_trestle,
    write_ventana,
    write_ventana_tiff,
)
from tests.support.zeiss import write_zeiss

Pixels = NDArray[np.uint8]

AREAS = (Area(120, 0, 4, 5, 0, 0), Area(300, 250, 4, 3, 4, 6))
"""Of the Ventana slide: the second one is to the right of the first and below it."""
REGIONS = (Region(100, 60, 320, 200), Region(440, 300, 240, 280))
SCENES = (Region(0, 80, 240, 160), Region(320, 0, 200, 320))
PLACES = (None, None, None, None, None, (120, 130), (118, 243), (121, 341)) + (
    (None, None, (234, 240), (233, 340))
)
"""Of the photos of the MIRAX slide: (y, x), 3 rows of 4."""


@dataclass(frozen=True)
class Vendor:
    """How a slide is written, and what a reader has to say of it."""

    name: str
    """OpenSlide's name of the vendor."""
    file: str
    write: Callable[[Path, Pixels], Path]
    height_px: int
    width_px: int
    mpp: float
    num_levels: int
    scanned: tuple[Region, ...]
    bounds: Bounds

    def make(self, folder: Path) -> Path:
        """Write the slide."""
        return self.write(folder / self.file, coordinate_colors(640, 768))

    def is_scanned(self, grow_px: int = 0) -> NDArray[np.bool_]:
        """Which pixels of level 0 were scanned, or are at most that far from one."""
        found = np.zeros((self.height_px, self.width_px), bool)
        for region in self.scanned:
            top, left = max(region.y - grow_px, 0), max(region.x - grow_px, 0)
            found[top : region.y + region.height + grow_px, left:][
                :, : region.x - left + region.width + grow_px
            ] = True
        return found


def _whole(height: int, width: int) -> tuple[tuple[Region, ...], Bounds]:
    return (Region(0, 0, width, height),), Bounds(0, 0, width, height)


VENDORS = {
    "philips": Vendor("philips", "p.tiff", write_philips, 640, 768, 0.25, 3, *_whole(640, 768)),
    "leica": Vendor(
        *("leica", "l.scn", lambda path, pixels: write_leica(path, pixels, REGIONS)),
        *(640, 768, 0.5, 2, REGIONS, Bounds(100, 60, 580, 520)),
    ),
    "ventana": Vendor(
        *("ventana", "v.bif", lambda path, pixels: write_ventana(path, pixels, AREAS)),
        *(482, 484, 0.25, 3, (Region(120, 0, 304, 232), Region(300, 250, 184, 232))),
        Bounds(0, 0, 484, 482),
    ),
    "ventana, odd overlap": Vendor(
        "ventana",
        "odd.bif",
        lambda path, pixels: write_ventana(path, pixels, AREAS, overlap=(5, 7)),
        *(491, 478, 0.25, 3, (Region(120, 0, 292, 241), Region(300, 250, 178, 241))),
        Bounds(0, 0, 478, 491),
    ),
    "ventana, no areas": Vendor(
        *("ventana", "plain.tif", write_ventana_tiff, 640, 768, 0.25, 3, *_whole(640, 768))
    ),
    "trestle": Vendor("trestle", "t.tif", write_trestle, 512, 512, 0.5, 2, *_whole(512, 512)),
    "ndpi": Vendor(
        *("hamamatsu", "n.ndpi", lambda path, pixels: write_ndpi(path, pixels[:512])),
        *(512, 768, 0.25, 6, *_whole(512, 768)),
    ),
    "ndpi, parts not listed": Vendor(
        "hamamatsu",
        "unlisted.ndpi",
        lambda path, pixels: write_ndpi(path, pixels[:512], has_restarts_listed=False),
        *(512, 768, 0.25, 6, *_whole(512, 768)),
    ),
    "vms": Vendor(
        *("hamamatsu", "h.vms", lambda path, pixels: write_vms(path, pixels[:512])),
        *(512, 768, 0.25, 6, *_whole(512, 768)),
    ),
    "zeiss": Vendor(
        *("zeiss", "z.czi", lambda path, pixels: write_zeiss(path, pixels, SCENES)),
        *(320, 520, 0.25, 3, SCENES, Bounds(0, 0, 520, 320)),
    ),
    "dicom": Vendor(
        *("dicom", "series/0.dcm"),
        lambda path, pixels: write_dicom_slide(path.parent, pixels[:500, :700]),
        *(500, 700, 0.5, 2, *_whole(500, 700)),
    ),
    "vmu": Vendor(
        *("hamamatsu", "u.vmu", lambda path, pixels: write_vmu(path, pixels[:512])),
        *(512, 768, 0.25, 2, *_whole(512, 768)),
    ),
    "mirax": Vendor(
        *("mirax", "m.mrxs"),
        lambda path, pixels: write_mirax(path, pixels, PLACES, photos=(3, 4)),
        *(364, 470, 0.25, 3),
        tuple(Region(place[1], place[0], 128, 128) for place in PLACES if place is not None),
        Bounds(130, 118, 339, 244),
    ),
}
"""Slides by the name of their layout. OpenSlide halves Hamamatsu's JPEGs to further levels."""
