"""From an image file to pixels: the one way in which training and serving read images.

Whatever comes in, what comes out is (H, W, 3) uint8 RGB, upright, with the um per pixel that the
file states, or an `ImageError` that says why not.
"""

import io
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from serve.contract.errors import ImageError, ImageTooLargeError
from serve.images import jpeg, png
from serve.images.bombs import refuse_bombs, refuse_large_exif
from serve.images.colors import repair_palette, to_rgb
from serve.images.mpp import (
    UNKNOWN,
    PixelSize,
    Stated,
    contradiction,
    density,
    first_believed,
    resolution,
)
from serve.images.refusals import (
    DECODER_ERRORS,
    damaged_file,
    refuse_bytes,
    refuse_kind,
    refuse_size,
    unknown_file,
)
from serve.images.tiff import TiffImage, find_image, is_tiff
from serve.images.tiff_codecs import check_segments, decode_segments, is_read_by_pillow
from serve.images.tiff_pages import is_unusual, unread_layout
from serve.images.units import UM_PER_INCH
from serve.settings import InferenceSettings

_DEFAULTS = InferenceSettings()
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP")
_ORIENTATION = 0x0112
TRANSPOSED = (5, 6, 7, 8)
"""Values of EXIF's orientation that swap width and height."""
_EXIF_RESOLUTION = {282: 0.0, 283: 0.0, 296: 2}
"""EXIF's XResolution, YResolution and ResolutionUnit, and what counts where they are missing."""
_JPEG_UM_PER_UNIT = {1: UM_PER_INCH, 2: 10_000.0}
"""JFIF's units of density: inch, centimetre; 0 is none."""


@dataclass(frozen=True)
class Picture:
    """A decoded image file."""

    pixels: NDArray[np.uint8]
    """(H, W, 3) uint8, RGB in [0, 255]."""
    pixel_size: PixelSize | None = None
    """um per pixel along each axis of `pixels`, if the file states them believably."""
    mpp_source: str = UNKNOWN
    """Where the file states it, such as "OME-XML"; see `serve.images.mpp`."""
    mpp_note: str = ""
    """What the file states of its scale and is not believed."""
    notes: tuple[str, ...] = ()
    """How the pixels differ from those that are stored, such as turned upright."""
    orientation: int = 1
    """Of the stored pixels, 1 to 8 as EXIF has it; 1 is upright."""

    @property
    def mpp(self) -> float | None:
        """Side of the square with a pixel's area, in um."""
        return None if self.pixel_size is None else self.pixel_size.mean

    def notes_at(self, given: float | None) -> tuple[str, ...]:
        """`notes`, and where the um per pixel that the caller gives is another than the file's."""
        return (*self.notes, *contradiction(self.pixel_size, self.mpp_source, given))


def decode_picture(
    data: bytes,
    *,
    max_bytes: int = _DEFAULTS.max_upload_bytes,
    max_pixels: int = _DEFAULTS.max_image_pixels,
) -> Picture:
    """Decode a file's content, judged by the content alone and never by a name.

    EXIF orientation and colour profiles are applied, transparency is composited on white, grey and
    CMYK become RGB. See `serve.images.tiff` for the page of a TIFF that is taken.

    Args:
        data: the bytes of a PNG, JPEG, TIFF or WebP file.
        max_bytes: the most bytes that are looked at.
        max_pixels: the most pixels, by the file's header, that are decoded.

    Raises:
        ImageTooLargeError: more bytes or pixels than allowed.
        ImageError: not such an image, truncated, damaged, animated, of more than 8 bits, or of a
            kind that would be taken for something else.
    """
    refuse_bytes(data, max_bytes)
    if is_tiff(data):
        return _decode_tiff(data, max_pixels)
    return _decode_with_pillow(data, max_pixels)


@dataclass(frozen=True)
class Head:
    """What an image file says of itself before its pixels are decoded."""

    height: int
    """Of the stored pixels, as `pixel_size`: the image may be turned when it is decoded."""
    width: int
    pixel_size: PixelSize | None
    mpp_source: str


def read_head(
    data: bytes,
    *,
    max_bytes: int = _DEFAULTS.max_upload_bytes,
    max_pixels: int = _DEFAULTS.max_image_pixels,
) -> Head:
    """Read a file's size and scale without decoding its pixels; see `decode_picture`.

    Raises:
        ImageError: `decode_picture` would refuse it by what its head says.
    """
    refuse_bytes(data, max_bytes)
    refuse_bombs(data)
    if is_tiff(data):
        found = find_image(data)
        width, height = found.pages[0].size
        refuse_size(width, height, max_pixels)
        stated = found.stated
    else:
        with _open(data, max_pixels) as image:
            refuse_kind(image, data)
            width, height = image.size
            stated = _stated_mpp(image)
    return Head(height, width, stated.pixel_size, stated.source)


def read_picture(path: Path, settings: InferenceSettings | None = None) -> Picture:
    """Read and decode an image file.

    Raises:
        ImageError: the file is missing, or `decode_picture` refuses it; the message names the file.
    """
    settings = settings or InferenceSettings()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    try:
        return decode_picture(
            data, max_bytes=settings.max_upload_bytes, max_pixels=settings.max_image_pixels
        )
    except ImageError as error:
        raise type(error)(f"{path}: {error}", code=error.code) from error


def _decode_tiff(data: bytes, max_pixels: int) -> Picture:
    """Decode a TIFF's page, or the three that are its red, green and blue."""
    refuse_bombs(data)
    found = find_image(data)
    refuse_size(*found.pages[0].size, max_pixels)
    decoded = [_decode_page(found, index, max_pixels) for index in range(len(found.pages))]
    picture, pixels = decoded[0], decoded[0].pixels
    if len(decoded) > 1:
        pixels = np.dstack([channel.pixels[..., 0] for channel in decoded])
    elif found.channel_order != (0, 1, 2):
        pixels = np.ascontiguousarray(pixels[..., list(found.channel_order)])
    picture = replace(picture, pixels=pixels, notes=(*found.notes, *picture.notes))
    return _with_mpp(picture, found.stated)


def _decode_page(found: TiffImage, index: int, max_pixels: int) -> Picture:
    page, data = found.pages[index], found.file(index)
    refuse_bombs(data)
    try:
        check_segments(data, page)
        if is_read_by_pillow(page):
            return _decode_with_pillow(data, max_pixels, page.orientation)
        image = decode_segments(data, page)
    except struct.error as error:
        raise damaged_file(error) from error
    except ImageError as error:
        if error.code == "image_unknown" or (error.code == "image_damaged" and is_unusual(page)):
            raise unread_layout(page) from error
        raise
    if page.orientation in range(2, 9):
        image.getexif()[_ORIENTATION] = page.orientation
    return _upright_rgb(image)


def _decode_with_pillow(data: bytes, max_pixels: int, orientation: int = 1) -> Picture:
    refuse_bombs(data)
    with _open(data, max_pixels) as image:
        refuse_kind(image, data)
        stated = _stated_mpp(image)
        try:
            image.verify()  # checks PNG's checksums, and leaves the image unusable
        except DECODER_ERRORS as error:
            raise damaged_file(error) from error
    if (pixels := png.decode_plain_png(data)) is not None:
        return _with_mpp(Picture(pixels), stated)
    with _open(data, max_pixels) as image:
        try:
            picture = _upright_rgb(image, orientation)
            if png.is_cut_short(image, data) or jpeg.is_cut_short(image, data):
                raise damaged_file(EOFError("it ends before its last row"))
            return _with_mpp(picture, stated)
        except ImageError:
            raise
        except DECODER_ERRORS as error:
            raise damaged_file(error) from error


def _with_mpp(picture: Picture, stated: Stated) -> Picture:
    """The picture with what its file states of the stored pixels, which may have been turned."""
    size = stated.pixel_size
    if size is not None and picture.orientation in TRANSPOSED:
        size = size.turned
    return replace(picture, pixel_size=size, mpp_source=stated.source, mpp_note=stated.note)


def _upright_rgb(image: Image.Image, orientation: int = 1) -> Picture:
    """Turn an image upright and convert it to RGB; says what it changed.

    Args:
        image: not loaded yet.
        orientation: a TIFF's, which Pillow applies and forgets while it loads it.
    """
    if image.format == "TIFF":  # its tag says which way is up; Pillow would take XMP's copy, too
        image.info.pop("xmp", None)
    image.load()  # turns a TIFF itself
    repair_palette(image)
    refuse_large_exif(image.info.get("exif"))
    orientation = image.getexif().get(_ORIENTATION, orientation)
    orientation = orientation if orientation in range(2, 9) else 1
    rgb, notes = to_rgb(ImageOps.exif_transpose(image))
    if orientation != 1:
        notes.insert(0, f"turned upright, from orientation {orientation}")
    return Picture(np.array(rgb, np.uint8), notes=tuple(notes), orientation=orientation)


def _stated_mpp(image: Image.Image) -> Stated:
    """What a PNG's pHYs, a JPEG's density or EXIF says; a TIFF's is read from its tags."""
    candidates = []
    if image.format == "PNG" and "dpi" in image.info:  # set for a pHYs chunk in metres
        x, y = (float(dpi) for dpi in image.info["dpi"])
        candidates.append(density(x, y, UM_PER_INCH, "PNG density"))
    if image.format in ("JPEG", "MPO"):  # MPO: a JPEG with previews behind it
        um = _JPEG_UM_PER_UNIT.get(image.info.get("jfif_unit", 0))
        x, y = image.info.get("jfif_density", (0, 0))
        candidates += [] if um is None else [density(float(x), float(y), um, "JPEG density")]
    if image.format != "TIFF":
        candidates.append(_exif_mpp(image.info.get("exif")))
    return first_believed(candidates)


def _exif_mpp(data: bytes | None) -> Stated:
    refuse_large_exif(data)
    exif = Image.Exif()
    try:
        exif.load(data or b"")
        x, y, unit = (exif.get(tag, default) for tag, default in _EXIF_RESOLUTION.items())
        return resolution(float(x), float(y), int(unit), "EXIF resolution")
    except DECODER_ERRORS:  # damaged EXIF says nothing
        return Stated()


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header only; no pixel is decoded before the size is known to be allowed."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(
            f"The image is far larger than the {max_pixels} pixels that are accepted. Crop it."
        ) from error
    except UnidentifiedImageError as error:
        raise unknown_file(data) from error
    except DECODER_ERRORS as error:
        raise damaged_file(error) from error
    refuse_size(*image.size, max_pixels)
    return image
