"""OME-TIFF with its pyramid in SubIFDs, which OpenSlide opens without the pyramid."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import tifffile
from numpy.typing import NDArray

from serve.images.readers.errors import SlideChannelsError, SlideError, SlideFormatError
from serve.images.readers.generic_tiff import (
    for_tifffile,
    is_for_pictures,
    look_at,
    refuse,
)
from serve.images.readers.reader import Bounds, RegionReader, pyramid
from serve.images.readers.tiff_pages import TIFF_ERRORS, TiledPage, first_page, open_tiff


class OmeTiffReader(RegionReader):
    """See `RegionReader`. Takes the largest image of the file."""

    name: ClassVar[str] = "ome-tiff"

    def __init__(self, path: Path, *, mpp: float | None = None) -> None:
        super().__init__(path, mpp=mpp)
        image = look_at(path)
        self._stated = image.stated
        try:
            self._tiff = open_tiff(path)
        except TIFF_ERRORS as error:
            raise SlideFormatError(
                f"{path.name} is not a TIFF: {error}. Check the file."
            ) from error
        try:
            refuse(path, for_tifffile(image))
            found = [s for s in self._tiff.series if s.keyframe.offset == image.pages[0].folder]
            pages = [_page_of(level, path) for level in (found or self._tiff.series)[0].levels]
            self._pages = [TiledPage(page, path) for page in pages]
        except SlideError:
            self._tiff.close()
            raise
        except TIFF_ERRORS as error:
            self._tiff.close()
            raise SlideFormatError(f"{path.name} is damaged: {error}. Copy it again.") from error
        self.levels = pyramid([(page.imagewidth, page.imagelength) for page in pages])
        self.bounds = Bounds(0, 0, self.width_px, self.height_px)
        self.properties = {"tiff.ImageDescription": pages[0].description}
        self.version = f"tifffile {tifffile.__version__}"

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """See `RegionReader.read`."""
        return self._pages[level].read(x, y, width, height)

    def close(self) -> None:
        """See `RegionReader.close`."""
        for page in self._pages:
            page.close()
        self._tiff.close()

    @classmethod
    def takes(cls, path: Path) -> bool:
        """Whether the file is a tiled OME-TIFF."""
        if not path.is_file():
            return False
        try:
            with open_tiff(path) as tiff:
                is_tiled = first_page(tiff).is_tiled
                return bool(tiff.is_ome) and is_tiled and not is_for_pictures(path, for_tifffile)
        except TIFF_ERRORS:
            return False


def _page_of(level: tifffile.TiffPageSeries, path: Path) -> tifffile.TiffPage:
    """The page that holds a level, where it is one of 8-bit RGB in tiles.

    Raises:
        SlideChannelsError: it has other channels or more bits.
        SlideFormatError: it is not stored in tiles.
    """
    page = level.keyframe
    if page.dtype != np.uint8:
        raise SlideChannelsError(
            f"{path.name} has values of {page.dtype}, expected 8 bits per channel. Convert it, so "
            "that you choose which value is white."
        )
    if len(level.pages) != 1 or page.samplesperpixel != 3 or page.planarconfig != 1:
        axes = dict(zip(level.axes, level.shape, strict=True))
        planes = "" if page.planarconfig == 1 else ", in planes"
        raise SlideChannelsError(
            f"{path.name} is {axes}, and a level of it has {len(level.pages)} images of "
            f"{page.samplesperpixel} channels{planes}; expected one of 3, RGB, channels last. "
            "Fluorescence and stacks are not segmented; convert what is brightfield to RGB."
        )
    if not page.is_tiled:
        raise SlideFormatError(f"{path.name} is not stored in tiles. Write it as a tiled TIFF.")
    return page
