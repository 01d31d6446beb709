"""Where views come from: any square of a slide, at any um per pixel, from any source.

`train.pretraining.sources.SOURCES` lists the sources.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from train.errors import ScaleError
from train.pretraining.footprints import Footprint

MAX_ENLARGEMENT = 1.15
"""A view may have at most this many times the slide's own pixels along a side."""
_LEVEL_TOLERANCE = 1.02
TISSUE_MPP = 8.0
"""um per pixel at which tissue is told from glass."""
_MIN_SATURATION = 8
"""Of 255. The rule of CLAM: tissue is where the saturation is above this."""
_CACHE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class SlideInfo:
    """One slide of a source."""

    name: str
    width_um: float
    height_um: float
    base_mpp: float
    """um per pixel of its finest level."""
    group: str
    """The patient or case; groups are never split between training and test."""
    fine_area: Footprint | None = None
    """Where the slide is as fine as `base_mpp`, if that is not everywhere."""
    outer_mpp: float | None = None
    """um per pixel outside of `fine_area`."""

    @property
    def area_um2(self) -> float:
        """Area of the whole slide."""
        return self.width_um * self.height_um

    def mpp_of(self, footprint: Footprint) -> float:
        """Um per pixel of the finest level that covers a square."""
        if self.fine_area is None or self.fine_area.contains(footprint):
            return self.base_mpp
        assert self.outer_mpp is not None, "a slide with a fine area has an outer mpp"
        return self.outer_mpp


class RegionSource(Protocol):
    """Slides that can be read by footprint."""

    slides: Sequence[SlideInfo]

    def read(self, slide: int, footprint: Footprint, size_px: int) -> NDArray[np.uint8]:
        """Read a square as (size_px, size_px, 3) uint8 RGB in [0, 255].

        From the coarsest level that is at least as fine as wanted, reduced with antialiasing.

        Raises:
            ScaleError: the view would be enlarged by more than `MAX_ENLARGEMENT`.
        """
        ...

    def tissue_share(self, slide: int, footprint: Footprint) -> float:
        """Share of the square that is tissue, in [0, 1], judged at 8 um per pixel."""
        ...


class Pyramid:
    """An image in memory with its reductions by two, read by footprint.

    Args:
        image: (H, W, 3) uint8 RGB.
        mpp: um per pixel of it.
    """

    def __init__(self, image: NDArray[np.uint8], mpp: float) -> None:
        self.levels = [image]
        self.mpps = [mpp]
        while min(self.levels[-1].shape[:2]) >= 64 and self.mpps[-1] < TISSUE_MPP:
            self.levels.append(_halved(self.levels[-1]))
            self.mpps.append(self.mpps[-1] * 2)
        self.tissue = tissue_mask(self.levels[-1])

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(level.nbytes for level in self.levels) + self.tissue.nbytes

    def read(self, footprint: Footprint, size_px: int) -> NDArray[np.uint8]:
        """Read a square as (size_px, size_px, 3) uint8."""
        wanted_mpp = footprint.side_um / size_px
        level = max(
            (i for i, mpp in enumerate(self.mpps) if mpp <= wanted_mpp * _LEVEL_TOLERANCE),
            default=0,
        )
        return read_box(self.levels[level], self.mpps[level], footprint, size_px)

    def tissue_share(self, footprint: Footprint) -> float:
        """Share of tissue in a square, in [0, 1]."""
        mpp = self.mpps[-1]
        top, left = int(footprint.y_um / mpp), int(footprint.x_um / mpp)
        side = max(1, round(footprint.side_um / mpp))
        return float(self.tissue[top : top + side, left : left + side].mean())


def check_enlargement(footprint: Footprint, size_px: int, mpp: float) -> float:
    """How often a view would enlarge pixels of `mpp` um.

    Raises:
        ScaleError: by more than `MAX_ENLARGEMENT`.
    """
    enlargement = size_px * mpp / footprint.side_um
    if enlargement > MAX_ENLARGEMENT:
        raise ScaleError(
            f"a view at {footprint.side_um / size_px:g} um per pixel would enlarge pixels of "
            f"{mpp:g} um by {enlargement:.2f}; at most {MAX_ENLARGEMENT} is allowed. Take coarser "
            "scales (--coarse-mpp, --fine-mpp) or finer slides."
        )
    return enlargement


def read_box(
    image: NDArray[np.uint8], mpp: float, footprint: Footprint, size_px: int
) -> NDArray[np.uint8]:
    """Cut a square out of an image at fractions of pixels, reduced with antialiasing.

    Args:
        image: (H, W, 3) uint8; the square must lie inside it.
        mpp: its um per pixel.
        footprint: the square.
        size_px: side of the result.

    Raises:
        ScaleError: it would be enlarged by more than `MAX_ENLARGEMENT`.
    """
    enlargement = check_enlargement(footprint, size_px, mpp)
    margin_px = 2 * max(1, int(np.ceil(1 / enlargement)))
    top, left = footprint.y_um / mpp, footprint.x_um / mpp
    side = footprint.side_um / mpp
    first_row = max(0, int(top) - margin_px)
    first_column = max(0, int(left) - margin_px)
    part = image[
        first_row : int(np.ceil(top + side)) + margin_px,
        first_column : int(np.ceil(left + side)) + margin_px,
    ]
    box = (
        max(0.0, left - first_column),
        max(0.0, top - first_row),
        min(float(part.shape[1]), left - first_column + side),
        min(float(part.shape[0]), top - first_row + side),
    )
    picture = Image.fromarray(np.ascontiguousarray(part))
    # Bilinear in Pillow is a triangle filter as wide as the reduction: antialiased.
    resized = picture.resize((size_px, size_px), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized, np.uint8)


def _halved(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Area means of 2 x 2 pixels; a last odd row or column is repeated.

    If it were dropped, a level would end before the slide, and views at its edge would be
    stretched.
    """
    odd_row, odd_column = (side % 2 for side in image.shape[:2])
    even = np.pad(image, ((0, odd_row), (0, odd_column), (0, 0)), mode="edge")
    height, width = even.shape[:2]
    blocks = even.reshape(height // 2, 2, width // 2, 2, 3)
    return np.asarray((blocks.astype(np.uint16).sum(axis=(1, 3)) + 2) // 4, np.uint8)


def tissue_mask(image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where a small image is tissue: (H, W) bool, by saturation."""
    saturation = np.asarray(Image.fromarray(image).convert("HSV"))[..., 1]
    return saturation > _MIN_SATURATION


class ImageRegions:
    """Large images in memory as slides: each decoded once, kept while memory allows.

    Args:
        slides: what the images are.
        open_image: reads image `i` as (H, W, 3) uint8 RGB.
    """

    def __init__(
        self, slides: Sequence[SlideInfo], open_image: Callable[[int], NDArray[np.uint8]]
    ) -> None:
        self.slides = slides
        self._open_image = open_image
        self._kept: OrderedDict[int, Pyramid] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, slide: int, footprint: Footprint, size_px: int) -> NDArray[np.uint8]:
        """Read a square as (size_px, size_px, 3) uint8."""
        return self._pyramid(slide).read(footprint, size_px)

    def tissue_share(self, slide: int, footprint: Footprint) -> float:
        """Share of tissue in a square, in [0, 1]."""
        return self._pyramid(slide).tissue_share(footprint)

    def _pyramid(self, slide: int) -> Pyramid:
        with self._lock:
            if (kept := self._kept.get(slide)) is not None:
                self._kept.move_to_end(slide)
                return kept
        pyramid = Pyramid(self._open_image(slide), self.slides[slide].base_mpp)
        with self._lock:
            self._kept[slide] = pyramid
            while sum(p.nbytes for p in self._kept.values()) > _CACHE_BYTES and len(self._kept) > 1:
                self._kept.popitem(last=False)
        return pyramid

    def __getstate__(self) -> dict[str, object]:
        """Leave decoded images out: each loader worker decodes its own."""
        return {"slides": self.slides, "_open_image": self._open_image}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Start with nothing decoded."""
        self.__init__(state["slides"], state["_open_image"])  # type: ignore[misc]
