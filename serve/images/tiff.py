"""Which page of a TIFF is the image.

- The image is the largest page of full resolution. Thumbnails, labels and macros, before or behind
  it, are passed over: pages that NewSubfileType or the description tells, and smaller ones.
- Three grey pages or channels that say which is red, green and blue are one image: by OME-XML's
  channel names or colours, by ImageJ's labels or lookup tables, or by ImageJ's composite mode,
  which shows them so.
- Other stacks are refused: nobody said which of their planes is meant.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from serve.contract.errors import ImageError
from serve.images.descriptions import OmeImage, image_of_size, read_imagej, read_ome
from serve.images.mpp import Stated, tiff_mpp
from serve.images.tiff_channels import stated_order
from serve.images.tiff_pages import GREY, RGB, Page, check_page, read_pages
from serve.images.tiff_tags import STARTS, FileBytes, Structure

_DESCRIPTION = 270
_PHOTOMETRIC, _EXTRA_SAMPLES = 262, 338


@dataclass(frozen=True)
class TiffImage:
    """The image of a TIFF: one page, or three that are its red, green and blue."""

    pages: tuple[Page, ...]
    channel_order: tuple[int, ...]
    """Which channel of a single page is red, green and blue."""
    stated: Stated
    """Its um per pixel."""
    notes: tuple[str, ...]
    """What the caller should know of the choice."""
    is_first_page: bool
    """It is the file's first page alone."""
    structure: Structure
    replaced: Mapping[int, int | None]
    """Tags that the metadata corrects."""

    def file(self, index: int) -> bytes:
        """A TIFF whose first page is the one of this index."""
        return self.structure.with_first(self.pages[index].folder, self.replaced)


def is_tiff(data: bytes) -> bool:
    """Whether the bytes begin as a TIFF's do."""
    return data.startswith(STARTS)


def find_image(data: bytes | FileBytes) -> TiffImage:
    """Find the image of a TIFF. Of a file, only tags are read.

    Raises:
        ImageError: the file is damaged, holds pixels of a kind that is not read, or a stack of
            planes that are not one RGB image.
    """
    structure = Structure(data)
    try:
        return _find_image(structure)
    except (struct.error, ArithmeticError, MemoryError) as error:
        raise ImageError(
            f"The TIFF is damaged or truncated: {error}. Send the file again.", code="image_damaged"
        ) from error


def _find_image(structure: Structure) -> TiffImage:
    pages = read_pages(structure)
    description = _text(structure, structure.first, _DESCRIPTION)
    candidates = [page for page in pages if not page.is_beside] or pages
    largest = max(candidates, key=lambda page: page.num_pixels)
    same = [page for page in candidates if page.size == largest.size]
    ome = image_of_size(read_ome(description), *largest.size)
    chosen: tuple[Page, ...] = (largest,)
    order: tuple[int, ...] = (0, 1, 2)
    replaced: dict[int, int | None] = {}
    if len(same) > 1 or _num_planes(largest, ome, read_imagej(description)) > 1:
        chosen = _merged(structure, same, description, ome)
    elif largest.num_samples == 3 and largest.photometric in GREY and set(largest.bits) == {8}:
        found = stated_order(structure, description, ome)
        if found is not None:
            order, replaced = tuple(found), {_PHOTOMETRIC: RGB, _EXTRA_SAMPLES: None}
    for page in chosen:
        check_page(page, are_colors_known=bool(replaced))
    descriptions = [description]
    if chosen[0] != pages[0]:
        descriptions.insert(0, _text(structure, chosen[0].folder, _DESCRIPTION))
    return TiffImage(
        chosen,
        order,
        tiff_mpp(descriptions, largest.resolution, largest.resolution_unit, size=largest.size),
        _notes(pages, chosen),
        chosen == (pages[0],),
        structure,
        replaced,
    )


def _text(structure: Structure, folder: int, name: int) -> bytes:
    """The bytes of a page's tag; none where it lacks it."""
    found = next((tag for tag in structure.tags(folder) if tag.number == name), None)
    return b"" if found is None else structure.text(found)


def _num_planes(page: Page, ome: OmeImage | None, imagej: dict[str, str]) -> int:
    """How many planes the metadata says there are, also where they have no pages of their own."""
    if ome is not None and (ome.size("X"), ome.size("Y")) == page.size:
        channels = math.ceil(ome.size("C") / page.num_samples)
        return channels * ome.size("Z") * ome.size("T")
    images = imagej.get("images", "1") if "imagej" in imagej else "1"
    return int(images) if images.isdecimal() and len(images) < 10 else 1


def _merged(
    structure: Structure, pages: list[Page], description: bytes, ome: OmeImage | None
) -> tuple[Page, ...]:
    """The pages that are red, green and blue, in this order."""
    if len(pages) == 3 and all(_is_plain_grey(page) for page in pages):
        order = stated_order(structure, description, ome)
        if order is not None:
            return tuple(pages[index] for index in order)
    message = _stack_message(pages, ome, read_imagej(description))
    raise ImageError(message, code="image_stack")


def _is_plain_grey(page: Page) -> bool:
    return page.num_samples == 1 and page.photometric in GREY and page.bits == (8,)


def _stack_message(pages: list[Page], ome: OmeImage | None, imagej: dict[str, str]) -> str:
    page = pages[0]
    plural = "s" if len(pages) > 1 else ""
    found = f"The TIFF holds {len(pages)} page{plural} of {page.width} x {page.height} pixels"
    if ome is not None:
        names = ", ".join(channel.get("Name", "?") for channel in ome.channels)
        axes = ", ".join(f"{axis} {ome.size(axis)}" for axis in "CZT")
        found += f" (OME: {axes}; channels {names or 'without names'})"
    elif "imagej" in imagej:
        kept = [key for key in ("images", "channels", "slices", "frames", "mode") if key in imagej]
        found += f" (ImageJ: {', '.join(f'{key} {imagej[key]}' for key in kept)})"
    return (
        f"{found}, expected one RGB image, or three 8-bit channels that say they are red, green "
        "and blue. Save the plane that you mean, or merge the channels to RGB."
    )


def _notes(pages: list[Page], chosen: tuple[Page, ...]) -> tuple[str, ...]:
    places = [pages.index(page) + 1 for page in chosen]
    if len(chosen) == 3:
        return (f"pages {places[0]}, {places[1]} and {places[2]} are its red, green and blue",)
    if places[0] != 1:
        return (f"page {places[0]} of {len(pages)} was read: the largest of full resolution",)
    return ()
