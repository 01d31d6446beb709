"""Slides in the layout of 3DHISTECH's MIRAX, small and written here.

What the layout is is told by OpenSlide's pages on formats. No scanner's own file is used.
"""

import io
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.support.vendor_tiffs import garish

Pixels = NDArray[np.uint8]

IMAGE_PX = 64
"""Side of the images; a photo is 2 x 2 of them."""
_DIVISIONS = 2
_PHOTO_PX = _DIVISIONS * IMAGE_PX
_SLIDE_ID = "0123456789ABCDEF0123456789ABCDEF"
_PLACES = "VIMSLIDE_POSITION_BUFFER"


class _Writer:
    """Data0000.dat and Index.dat, as they grow."""

    def __init__(self) -> None:
        self.data = bytearray(b"MIRAX data")
        self.index = bytearray(f"01.02{_SLIDE_ID}".encode() + bytes(8))

    def store(self, content: bytes) -> tuple[int, int]:
        """Append to the data; (place, length)."""
        place = len(self.data)
        self.data.extend(content)
        return place, len(content)

    def page(self, content: bytes) -> int:
        """Append a page of the index with the pointer to it; where that is."""
        page = len(self.index)
        self.index.extend(content)
        place = len(self.index)
        self.index.extend(struct.pack("<2i", 0, page))
        return place

    def table(self, pages: Sequence[int], root: int) -> None:
        """Append where pages are, and link to that from a root."""
        place = len(self.index)
        self.index.extend(struct.pack(f"<{len(pages)}i", *pages))
        start = len("01.02") + len(_SLIDE_ID) + 4 * root
        self.index[start : start + 4] = struct.pack("<i", place)


def write_mirax(
    path: Path,
    pixels: Pixels,
    places: Sequence[tuple[int, int] | None],
    *,
    photos: tuple[int, int],
    overlap: tuple[int, int] = (10, 14),
    mpp: tuple[float, float] = (0.25, 0.25),
    num_levels: int = 3,
    fill: str = "FFFFFF",
) -> Path:
    """Write a MIRAX slide: photos that overlap, at places of their own, in a folder beside `path`.

    Args:
        path: the file that is opened.
        pixels: (H, W, 3) of the whole slide: a photo shows what is at its place.
        places: (y, x) of each photo of 128 x 128 pixels, row by row; None where none was taken.
        photos: (rows, columns) of photos.
        overlap: (y, x) pixels by which neighbours overlap at least.
        mpp: um per pixel along x and y.
        num_levels: of the pyramid, each half of the one before.
        fill: colour of what was not scanned, BGR in hexadecimal digits.
    """
    rows, columns = (count * _DIVISIONS for count in photos)
    images = {
        (row, column): _image_of(pixels, places[_photo(row, column, photos[1])], row, column)
        for row, column in np.ndindex(rows, columns)
    }
    writer = _Writer()
    pages = []
    for level in range(num_levels):
        step = 2**level
        records = []
        for row, column in np.ndindex(-(-rows // step), -(-columns // step)):
            image = _joined(images, row * step, column * step, step)
            if image is not None:
                number = row * step * columns + column * step
                records.append(struct.pack("<4i", number, *writer.store(_jpeg(image)), 0))
        pages.append(writer.page(struct.pack("<2i", len(records), 0) + b"".join(records)))
    writer.table(pages, 0)
    flagged = b"".join(
        struct.pack("<bii", 1, *((0, 0) if place is None else place[::-1])) for place in places
    )
    others = [flagged, _jpeg(garish(48, 64)), _jpeg(garish(32, 32))]
    records = [struct.pack("<7i", 1, 0, 0, 0, *writer.store(content), 0) for content in others]
    writer.table([writer.page(record) for record in records], 1)
    folder = path.with_suffix("")
    folder.mkdir()
    path.write_bytes(_jpeg(garish(24, 32)))
    (folder / "Index.dat").write_bytes(writer.index)
    (folder / "Data0000.dat").write_bytes(writer.data)
    text = _slidedat((rows, columns), overlap, mpp, num_levels, fill)
    (folder / "Slidedat.ini").write_text(text, encoding="utf-8-sig")
    return path


def _photo(row: int, column: int, photos_across: int) -> int:
    return row // _DIVISIONS * photos_across + column // _DIVISIONS


def _image_of(
    pixels: Pixels, place: tuple[int, int] | None, row: int, column: int
) -> Pixels | None:
    """The part of a photo that is one image."""
    if place is None:
        return None
    top, left = (
        start + at % _DIVISIONS * IMAGE_PX for start, at in zip(place, (row, column), strict=True)
    )
    return pixels[top : top + IMAGE_PX, left : left + IMAGE_PX]


def _joined(
    images: dict[tuple[int, int], Pixels | None], row: int, column: int, step: int
) -> Pixels | None:
    """The images of a square side by side, shrunk to the size of one; None where there is none."""
    some = [[images.get((row + y, column + x)) for x in range(step)] for y in range(step)]
    if all(image is None for line in some for image in line):
        return None
    black = np.zeros((IMAGE_PX, IMAGE_PX, 3), np.uint8)
    whole = np.concatenate(
        [
            np.concatenate([black if image is None else image for image in line], axis=1)
            for line in some
        ]
    )
    means = whole.reshape(IMAGE_PX, step, IMAGE_PX, step, 3).mean(axis=(1, 3))
    return np.rint(means).astype(np.uint8)


def _jpeg(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=97, subsampling=0)
    return buffer.getvalue()


def _slidedat(
    images: tuple[int, int],
    overlap: tuple[int, int],
    mpp: tuple[float, float],
    num_levels: int,
    fill: str,
) -> str:
    """The text that describes the slide."""
    levels = range(num_levels)
    lines = [
        "[GENERAL]",
        f"SLIDE_ID = {_SLIDE_ID}",
        f"IMAGENUMBER_X = {images[1]}",
        f"IMAGENUMBER_Y = {images[0]}",
        "SLIDE_TYPE = SLIDE_TYPE_BRIGHTFIELD",
        "OBJECTIVE_MAGNIFICATION = 20",
        f"CameraImageDivisionsPerSide = {_DIVISIONS}",
        "[HIERARCHICAL]",
        "HIER_COUNT = 1",
        "NONHIER_COUNT = 2",
        "INDEXFILE = Index.dat",
        "HIER_0_NAME = Slide zoom level",
        f"HIER_0_COUNT = {num_levels}",
        *(f"HIER_0_VAL_{level}_SECTION = LEVEL_{level}" for level in levels),
        f"NONHIER_0_NAME = {_PLACES}",
        "NONHIER_0_COUNT = 1",
        "NONHIER_0_VAL_0 = default",
        "NONHIER_0_VAL_0_SECTION = PLACES",
        "NONHIER_1_NAME = Scan data layer",
        "NONHIER_1_COUNT = 2",
        "NONHIER_1_VAL_0 = ScanDataLayer_SlideThumbnail",
        "NONHIER_1_VAL_0_SECTION = MACRO",
        "NONHIER_1_VAL_1 = ScanDataLayer_SlideBarcode",
        "NONHIER_1_VAL_1_SECTION = LABEL",
        "[DATAFILE]",
        "FILE_COUNT = 1",
        "FILE_0 = Data0000.dat",
        "[MACRO]",
        "THUMBNAIL_IMAGE_TYPE = JPEG",
        "[LABEL]",
        "BARCODE_IMAGE_TYPE = JPEG",
    ]
    for level in levels:
        lines += [
            f"[LEVEL_{level}]",
            f"IMAGE_CONCAT_FACTOR = {min(level, 1)}",
            f"OVERLAP_X = {overlap[1] / 2**level:g}",
            f"OVERLAP_Y = {overlap[0] / 2**level:g}",
            f"MICROMETER_PER_PIXEL_X = {mpp[0] * 2**level:g}",
            f"MICROMETER_PER_PIXEL_Y = {mpp[1] * 2**level:g}",
            f"IMAGE_FILL_COLOR_BGR = {int(fill, 16)}",
            f"DIGITIZER_WIDTH = {IMAGE_PX}",
            f"DIGITIZER_HEIGHT = {IMAGE_PX}",
            "IMAGE_FORMAT = JPEG",
        ]
    return "\r\n".join(lines) + "\r\n"
