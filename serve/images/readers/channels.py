"""Refuses scanners' slides that are not brightfield RGB with 8 bits per channel.

OpenSlide turns all that it opens into RGB with 8 bits, unasked: grey to grey, and of 16 bits the
upper 8, which is nearly black where a camera gave 12 or 14.
"""

import re
import struct
from collections.abc import Mapping
from pathlib import Path

from serve.contract.errors import ImageError
from serve.images.readers.errors import SlideChannelsError, SlideFormatError
from serve.images.tiff import is_tiff
from serve.images.tiff_pages import MAX_TILE_SIDE, Page, read_pages
from serve.images.tiff_tags import STARTS, FileBytes, Structure

_STATED = {
    ("zeiss.Information.Image.PixelType", "Bgr48"): "colours of 16 bits (Bgr48)",
    ("mirax.GENERAL.SLIDE_TYPE", "SLIDE_TYPE_FLUORESCENCE"): "fluorescence",
}
"""OpenSlide's properties and values that tell, and what they mean."""
_NO_BRIGHTFIELD = "Can't find main image"
"""OpenSlide's reason for a Leica slide whose images are all of fluorescence."""
_TILE_BYTES = 325
_VMU = "[Uncompressed Virtual Microscope Specimen]"
_VMU_LINE = re.compile(r"^\s*(BitsPerPixel|PixelOrder)\s*=[ \t]*(\S*)", re.MULTILINE)
_VMU_COLORS = {"BitsPerPixel": "36", "PixelOrder": "RGB"}
_MAX_TEXT_BYTES = 2**16
_START_BYTES = max(map(len, STARTS))


def refuse_channels_of(path: Path, page: Page) -> None:
    """Raise SlideChannelsError for a page that is not RGB with 8 bits."""
    if not _is_rgb(page):
        raise _refusal(path, f"{page.num_samples} channels of {max(page.bits)} bits")


def refuse_tiles(path: Path) -> None:
    """Raise SlideChannelsError for a scanner's TIFF whose largest page in tiles is not such RGB.

    And SlideFormatError for tiles of so many pixels or bytes that OpenSlide ends the process for
    want of memory. Of several pages of that size one has to be: a slide may have been scanned with
    other light, too, and OpenSlide leaves that out. What cannot be read here is left to OpenSlide.
    """
    with path.open("rb") as file:
        if not is_tiff(file.read(_START_BYTES)):
            return
        try:
            structure = Structure(FileBytes(file))
            pages = [page for page in read_pages(structure) if page.tile is not None]
            most_bytes = max((_most_bytes(structure, page) for page in pages), default=0)
        except (ImageError, struct.error, ArithmeticError, MemoryError):
            return
    if most_bytes > path.stat().st_size:
        raise SlideFormatError(
            f"{path.name} is damaged: it has a tile of {most_bytes} bytes, more than the file has. "
            "Copy it again."
        )
    for width, height in (page.tile for page in pages if page.tile is not None):
        if max(width, height) > MAX_TILE_SIDE:
            raise SlideFormatError(
                f"{path.name} is damaged: it has tiles of {width} x {height} pixels, expected at "
                f"most {MAX_TILE_SIDE} a side. Copy it again."
            )
    largest = max((page.num_pixels for page in pages), default=0)
    pages = [page for page in pages if page.num_pixels == largest]
    if pages and not any(map(_is_rgb, pages)):
        refuse_channels_of(path, pages[0])


def _most_bytes(structure: Structure, page: Page) -> int:
    """Bytes of the largest tile of a page, as its tags say."""
    tags = (tag for tag in structure.tags(page.folder) if tag.number == _TILE_BYTES)
    return max(
        (int(size) for tag in tags for size in structure.values(tag, tag.num_values)), default=0
    )


def refuse_stated(path: Path, properties: Mapping[str, str]) -> None:
    """Raise SlideChannelsError for a slide that says of itself that it is not such RGB.

    Args:
        path: the slide.
        properties: OpenSlide's.
    """
    for (name, value), meaning in _STATED.items():
        if properties.get(name, "").casefold() == value.casefold():
            raise _refusal(path, meaning)


def refuse_vmu(path: Path) -> None:
    """Raise SlideChannelsError for a VMU slide of other colours than OpenSlide reads.

    OpenSlide 4.0.1 would crash, and end the process.
    """
    with path.open("rb") as file:
        text = file.read(_MAX_TEXT_BYTES).decode("latin-1")
    found = dict(_VMU_LINE.findall(text))
    if _VMU in text and found != _VMU_COLORS:
        stated = ", ".join(f"{name}={found.get(name, '')}" for name in _VMU_COLORS)
        raise _refusal(path, f"other colours than are read of VMU slides ({stated})")


def refuse_unlit(path: Path, reason: str) -> None:
    """Raise SlideChannelsError where OpenSlide says that a slide has no brightfield image."""
    if reason == _NO_BRIGHTFIELD:
        raise _refusal(path, "no brightfield image")


def _is_rgb(page: Page) -> bool:
    return page.num_samples >= 3 and set(page.bits) == {8}


def _refusal(path: Path, found: str) -> SlideChannelsError:
    return SlideChannelsError(
        f"{path.name} has {found}, expected brightfield RGB with 8 bits per channel. Fluorescence "
        "is not segmented; convert what is brightfield to 8-bit RGB."
    )
