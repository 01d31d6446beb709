"""A PNG, JPEG, TIFF or WebP image as a slide of one level, held in memory."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import PIL
from numpy.typing import NDArray

from serve.images.decode import read_picture
from serve.images.mpp import Stated
from serve.images.readers.reader import Bounds, RegionReader, pyramid
from serve.settings import MEGAPIXEL, PILLOW_LIMIT_MEGAPIXELS, InferenceSettings

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
MAX_PIXELS = PILLOW_LIMIT_MEGAPIXELS * MEGAPIXEL
_LIMITS = InferenceSettings(max_upload_mib=4096, max_image_megapixels=PILLOW_LIMIT_MEGAPIXELS)


class PictureReader(RegionReader):
    """See `RegionReader`."""

    name: ClassVar[str] = "picture"

    def __init__(self, path: Path, *, mpp: float | None = None) -> None:
        super().__init__(path, mpp=mpp)
        picture = read_picture(path, _LIMITS)
        self._pixels = picture.pixels
        self.orientation = picture.orientation
        self._stated = Stated(picture.pixel_size, picture.mpp_source, picture.mpp_note)
        height, width = self._pixels.shape[:2]
        self.levels = pyramid([(width, height)])
        self.bounds = Bounds(0, 0, width, height)
        self.properties = {}
        self.version = f"Pillow {PIL.__version__}"

    @classmethod
    def takes(cls, path: Path) -> bool:
        """See `RegionReader.takes`."""
        return path.is_file() and path.suffix.lower() in SUFFIXES

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """See `RegionReader.read`."""
        assert level == 0, level
        return cut(self._pixels, x, y, width, height)

    def close(self) -> None:
        """See `RegionReader.close`."""


def cut(pixels: NDArray[np.uint8], x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
    """Cut a region out of (H, W, 3) pixels; white beyond their edges."""
    found = np.full((height, width, 3), 255, np.uint8)
    top, left = max(y, 0), max(x, 0)
    part = pixels[top : max(y + height, 0), left : max(x + width, 0)]
    rows, columns = part.shape[:2]
    found[top - y : top - y + rows, left - x : left - x + columns] = part
    return found
