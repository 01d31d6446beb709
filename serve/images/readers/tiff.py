"""Aperio and generic TIFF with JPEG tiles: OpenSlide's pixels at a quarter of its cost.

OpenSlide opens the slide and says what it is. Pixels of the levels that tifffile decodes to the
same bytes are read with tifffile, those of other levels with OpenSlide.
"""

from pathlib import Path
from typing import ClassVar

import numpy as np
import openslide
import tifffile
from numpy.typing import NDArray

from serve.images.readers.errors import SlideFormatError
from serve.images.readers.openslide import OpenSlideReader
from serve.images.readers.tiff_pages import TIFF_ERRORS, TiledPage, first_page, open_tiff

VENDORS = ("aperio", "generic-tiff")
_RGB, _YCBCR = 2, 6


class TiffReader(OpenSlideReader):
    """See `RegionReader`."""

    name: ClassVar[str] = "tiff"

    def __init__(self, path: Path, *, mpp: float | None = None) -> None:
        super().__init__(path, mpp=mpp)
        self._pages: dict[int, TiledPage] = {}
        try:
            self._tiff = open_tiff(path)
            is_fast = self.properties["openslide.vendor"] in VENDORS
            pages = _fast_pages(self._tiff) if is_fast else {}
        except TIFF_ERRORS as error:
            raise SlideFormatError(
                f"{path.name} is not a TIFF: {error}. Use the reader `openslide`."
            ) from error
        for index, level in enumerate(self.levels):
            page = pages.pop((level.width_px, level.height_px), None)
            if page is not None:
                self._pages[index] = TiledPage(page, path)
        self.version = f"{self.version}, tifffile {tifffile.__version__}"

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """See `RegionReader.read`."""
        page = self._pages.get(level)
        if page is None:
            return super().read(level, x, y, width, height)
        return page.read(x, y, width, height)

    def close(self) -> None:
        """See `RegionReader.close`."""
        for page in self._pages.values():
            page.close()
        self._tiff.close()
        super().close()

    @classmethod
    def takes(cls, path: Path) -> bool:
        """Whether level 0 of the slide is read faster here, with the same pixels."""
        if not path.is_file() or openslide.OpenSlide.detect_format(path) not in VENDORS:
            return False
        if not super().takes(path):
            return False
        try:
            with open_tiff(path) as tiff:
                first = first_page(tiff)
                if tiff.is_ome and (first.subifds or len(tiff.series) > 1):
                    return False  # the reader of OME-TIFF knows its levels and images
                return (first.imagewidth, first.imagelength) in _fast_pages(tiff)
        except TIFF_ERRORS:
            return False


def _fast_pages(tiff: tifffile.TiffFile) -> dict[tuple[int, int], tifffile.TiffPage]:
    """The pages that tifffile decodes to the bytes that OpenSlide gives, by (width, height).

    Of pages of one size, such as focal planes, OpenSlide takes the first for the first level.
    """
    first: dict[tuple[int, int], tifffile.TiffPage] = {}
    for page in tiff.pages:
        if isinstance(page, tifffile.TiffPage) and page.is_tiled:
            first.setdefault((page.imagewidth, page.imagelength), page)
    return {size: page for size, page in first.items() if _is_decoded_alike(page)}


def _is_decoded_alike(page: tifffile.TiffPage) -> bool:
    return bool(
        page.compression == tifffile.COMPRESSION.JPEG
        and page.photometric in (_RGB, _YCBCR)
        and page.samplesperpixel == 3
        and page.planarconfig == 1
        and page.bitspersample == 8
        and all(page.databytecounts)  # OpenSlide fills missing tiles from other levels
    )
