"""Plain and OME-TIFFs as slides: those that a reader would show differently from images.

OpenSlide takes the first page for the slide, whatever its tags say. Neither it nor tifffile turns
pixels upright. What is small enough is left to the reader of pictures; the rest is refused.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from serve.contract.errors import ImageError
from serve.images.readers.channels import refuse_channels_of
from serve.images.readers.errors import SlideChannelsError, SlideError, SlideFormatError
from serve.images.readers.picture import MAX_PIXELS, PictureReader
from serve.images.readers.slide_files import FileState, state_of
from serve.images.tiff import TiffImage, find_image, is_tiff
from serve.images.tiff_tags import FileBytes

GENERIC = "generic-tiff"
"""OpenSlide's vendor of TIFFs in tiles that no scanner's program wrote."""
_START_BYTES = 8
_JPEG = 7
_YCBCR, _CIELAB = 6, 8
_OPENSLIDE_READS = frozenset({1, 5, _JPEG, 8, 32773, 32946, 50000})
"""Compressions of tiles: none, LZW, JPEG, Deflate, PackBits, Zstandard."""


def look_at(path: Path) -> TiffImage:
    """What a TIFF's tags say of its image and of the um per pixel.

    Raises:
        SlideFormatError: it is not a TIFF, or damaged.
        SlideChannelsError: it is not one image of 8-bit colours.
    """
    if not path.is_file():
        raise SlideFormatError(f"{path.name} is not a file. Use another reader.")
    return _look_at(path, state_of([path]))


@lru_cache(maxsize=16)
def _look_at(path: Path, state: FileState) -> TiffImage:
    """See `look_at`; the choice of a reader, its refusals and the reader itself ask the same."""
    with path.open("rb") as file:
        if not is_tiff(file.read(_START_BYTES)):
            raise SlideFormatError(f"{path.name} is not a TIFF. Use another reader.")
        try:
            return find_image(FileBytes(file))
        except ImageError as error:
            kind = SlideFormatError if error.code == "image_damaged" else SlideChannelsError
            raise kind(f"{path.name}: {error}") from error


def is_for_pictures(path: Path, why_not: Callable[[TiffImage], str]) -> bool:
    """Whether a TIFF of colours is left to the reader of pictures.

    Args:
        path: the file.
        why_not: `for_openslide` or `for_tifffile`.
    """
    try:
        image = look_at(path)
    except SlideError:
        return False
    is_color = image.pages[0].num_samples >= 3 or len(image.pages) == 3
    is_small = image.pages[0].num_pixels <= MAX_PIXELS and PictureReader.takes(path)
    return is_color and is_small and bool(why_not(image))


def refuse(path: Path, why_not: str) -> None:
    """Raise SlideFormatError where there is a reason."""
    if why_not:
        raise SlideFormatError(
            f"{path.name} cannot be read as a slide: {why_not}. Convert it to a pyramidal TIFF of "
            "one RGB image."
        )


def refuse_channels(path: Path) -> None:
    """Raise SlideChannelsError for a TIFF that OpenSlide would turn into RGB unasked."""
    image = look_at(path)
    page = image.pages[0]
    if len(image.pages) == 1:
        refuse_channels_of(path, page)


def for_openslide(image: TiffImage) -> str:
    """Why OpenSlide would not show an image's pixels; empty where it would."""
    page = image.pages[0]
    if len(image.pages) == 1 and not image.is_first_page:
        return "its first page is not its image, but a thumbnail or the like"
    if page.is_planar and page.compression == _JPEG:
        return "its colours are compressed by JPEG one by one"
    if page.num_samples > 4 or (page.num_samples == 4 and page.extra_sample not in (1, 2)):
        return f"it has {page.num_samples} channels"
    if page.photometric == _CIELAB:
        return "its colours are CIELab"  # libtiff takes another white than Pillow
    if page.compression not in _OPENSLIDE_READS:
        return f"OpenSlide does not read its compression ({page.compression})"
    return _for_any(image)


def for_tifffile(image: TiffImage) -> str:
    """Why tifffile's tiles would not show an image's pixels; empty where they would."""
    page = image.pages[0]
    if page.is_planar or page.num_samples != 3:
        return f"it has {page.num_samples} channels, or its colours apart"
    if page.photometric == _CIELAB or (page.photometric == _YCBCR and page.compression != _JPEG):
        return "its colours are stored as CIELab or YCbCr"
    return _for_any(image)


def _for_any(image: TiffImage) -> str:
    orientation = image.pages[0].orientation
    if len(image.pages) > 1:
        return "its red, green and blue are pages of their own"
    if orientation in range(2, 9):
        return f"it is stored turned or mirrored (orientation {orientation})"
    if image.channel_order != (0, 1, 2):
        return "its channels are in another order than red, green and blue"
    return ""
