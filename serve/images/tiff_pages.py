"""The pages of a TIFF as their tags describe them, and what of a page cannot be read."""

import re
from dataclasses import dataclass

from serve.contract.errors import ImageError
from serve.images.descriptions import as_text
from serve.images.tiff_tags import Structure

MAX_TAGS_IN_ALL = 65_536
"""Of all pages together: bounds the time that their reading takes."""
_NOT_THE_IMAGE = re.compile(
    r"(?:^|\n)\s*(?:label|macro|thumbnail|overview|probability|map)(?:[_ -]?image)?"
    r"\s*(?:[\0|;]|\d+ ?x ?\d+|[\r\n]|$)",
    re.IGNORECASE,
)
"""How Aperio, Ventana and Hamamatsu describe pages beside the slide: a word, at most with a size.
Sentences that begin with such a word are users' own."""
_DESCRIPTION_START = 256
_HAMAMATSU_LENS = 65421
"""The lens: 20 or 40; -1 of the macro, -2 of the map."""
MAX_TILE_SIDE = 8_192
"""Pixels. A small page may claim huge tiles, which are decoded as a whole."""
GREY = (0, 1)
"""PhotometricInterpretation: white is zero, black is zero."""
RGB = 2
_NOT_STATED = -1
_YCBCR, _CMYK = 6, 5
_CMYK_INKS = 1
_PHOTOMETRICS = {
    0: "white is zero",
    1: "black is zero",
    2: "RGB",
    3: "palette",
    4: "mask",
    5: "CMYK",
    6: "YCbCr",
    8: "CIELab",
    9: "ICCLab",
    10: "ITULab",
    32803: "colour filter array",
    32844: "LogL",
    32845: "LogLuv",
    34892: "linear raw",
}
_NUM_COLORS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}
"""Channels by PhotometricInterpretation, of those that are read."""
_SAMPLE_FORMATS = {1: "unsigned", 2: "signed", 3: "float", 5: "complex", 6: "complex"}


@dataclass(frozen=True)
class Page:
    """What the tags of a page say."""

    folder: int
    """Where its tags are in the file."""
    width: int
    height: int
    num_samples: int
    bits: tuple[int, ...]
    sample_format: int
    extra_sample: int
    """What the first channel beside the colours is: 1 and 2 are alpha, 0 is not said."""
    photometric: int
    compression: int
    is_planar: bool
    tile: tuple[int, int] | None
    """Columns and rows of a tile; None where it has strips."""
    orientation: int
    """1 to 8, as EXIF has it."""
    resolution: tuple[float, float] | None
    resolution_unit: int
    ink_set: int
    """1 where the inks of CMYK are cyan, magenta, yellow and black."""
    subsampling: tuple[int, int]
    """Pixels across and down that share the colours of YCbCr."""
    is_beside: bool
    """It is a thumbnail, a mask, a label or a macro."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height

    @property
    def num_pixels(self) -> int:
        """Pixels of the page."""
        return self.width * self.height


def check_page(page: Page, *, are_colors_known: bool = False) -> None:
    """Raise ImageError for a page whose pixels would be taken for something else.

    Args:
        page: what its tags say.
        are_colors_known: the metadata says which of its grey channels is red, green and blue.
    """
    if page.tile is not None and not all(0 < side <= MAX_TILE_SIDE for side in page.tile):
        raise ImageError(
            f"The TIFF has tiles of {page.tile[0]} x {page.tile[1]} pixels, at most "
            f"{MAX_TILE_SIDE} a side are read. Write it again with another program.",
            code="image_bomb",
        )
    if page.sample_format != 1:
        kind = _SAMPLE_FORMATS.get(page.sample_format, "unknown")
        raise ImageError(
            f"The image has {max(page.bits)} bits per channel, as {kind} numbers; expected 8, "
            "unsigned. Convert it to 8 bits, so that you choose which value is white.",
            code="image_depth",
        )
    if max(page.bits) > 8:
        raise ImageError(
            f"The image has {max(page.bits)} bits per channel, expected 8. Convert it to 8 bits, "
            "so that you choose which value is white.",
            code="image_depth",
        )
    refuse_unstated(page)
    name = _PHOTOMETRICS.get(page.photometric, "unknown")
    if page.photometric not in _NUM_COLORS:
        raise ImageError(
            f"The TIFF's pixels are {name} (PhotometricInterpretation {page.photometric}), "
            "expected RGB, grey, palette, CMYK, YCbCr or CIELab. Convert it to RGB.",
            code="image_colors",
        )
    if page.photometric == _CMYK and page.ink_set != _CMYK_INKS:
        raise ImageError(
            f"The TIFF's channels are inks of its own (InkSet {page.ink_set}), expected cyan, "
            "magenta, yellow and black. Convert it to RGB.",
            code="image_colors",
        )
    if page.compression == 1 and page.photometric == _YCBCR and page.subsampling != (1, 1):
        raise unread_layout(page)  # Pillow takes the bytes for those of all pixels
    is_grey_alpha = page.num_samples == 2 and page.extra_sample in (1, 2)
    is_one_grey = page.num_samples == 1 or is_grey_alpha
    if page.photometric in GREY and not is_one_grey and not are_colors_known:
        raise ImageError(
            f"The TIFF has {page.num_samples} channels that do not say which is red, green and "
            f"blue (PhotometricInterpretation {page.photometric}). Save it as RGB.",
            code="image_stack",
        )


def refuse_unstated(page: Page) -> None:
    """Raise ImageError for a page without its colours' meaning: programs then guess differently."""
    if page.photometric == _NOT_STATED:
        raise ImageError(
            "The TIFF does not say what its pixels are (PhotometricInterpretation is missing), "
            "expected RGB, grey or the like. Write it again with another program.",
            code="image_colors",
        )


def is_unusual(page: Page) -> bool:
    """Whether Pillow may fail on a page that is whole, for how its colours are stored."""
    return page.is_planar and (page.photometric == _YCBCR or page.extra_sample != 0)


def unread_layout(page: Page) -> ImageError:
    """The error of a page, found to be unreadable, for the layout of its pixels."""
    channels = f"{page.num_samples} channel" + ("s" if page.num_samples > 1 else "")
    depth = f"{max(page.bits)} bit" + ("s" if max(page.bits) > 1 else "")
    kind = _PHOTOMETRICS[page.photometric]
    if page.subsampling != (1, 1) and page.photometric == _YCBCR:
        kind += ", subsampled {} x {}".format(*page.subsampling)
    return ImageError(
        f"The TIFF has {channels} of {depth}{' in planes' if page.is_planar else ''} ({kind}), a "
        "layout that is not read. Save it as RGB with 8 bits per channel.",
        code="image_colors",
    )


def read_pages(structure: Structure) -> list[Page]:
    """Read the tags of all pages.

    Raises:
        ImageError: it has no page, or more tags than are read.
        struct.error: it ends before what it names.
    """
    pages, num_tags = [], 0
    for folder in structure.all_folders():
        num_tags += structure.num_tags(folder)
        if num_tags > MAX_TAGS_IN_ALL:
            raise ImageError(
                f"The TIFF has {num_tags} tags, at most {MAX_TAGS_IN_ALL} are accepted. Write it "
                "again with another program."
            )
        pages.append(_read_page(structure, folder))
    if not pages:
        raise ImageError("The TIFF has no page. Send the file again.")
    return pages


def _read_page(structure: Structure, folder: int) -> Page:
    tags = {tag.number: tag for tag in structure.tags(folder)}

    def numbers(name: int) -> tuple[int, ...]:
        values = structure.values(tags[name]) if name in tags else ()
        return tuple(int(value) for value in values)

    def number(name: int, default: int) -> int:
        return next(iter(numbers(name)), default)

    resolution = [
        value for name in (282, 283) if name in tags for value in structure.values(tags[name])[:1]
    ]
    formats, shared = numbers(339), numbers(530)
    beginning = structure.text(tags[270])[:_DESCRIPTION_START] if 270 in tags else b""
    subfile = number(254, 0)
    is_reduced = bool(subfile & 0b101) or number(255, 1) == 2  # smaller, or a mask
    is_reduced |= number(_HAMAMATSU_LENS, 0) < 0  # a macro or a map
    return Page(
        folder=folder,
        width=number(256, 0),
        height=number(257, 0),
        num_samples=number(277, 1),
        bits=numbers(258) or (1,),
        sample_format=next((form for form in formats if form != 1), 1),
        extra_sample=number(338, 0),
        photometric=number(262, _NOT_STATED),
        compression=number(259, 1),
        is_planar=number(284, 1) == 2,
        tile=(number(322, 0), number(323, 0)) if 322 in tags else None,
        orientation=number(274, 1),
        resolution=(resolution[0], resolution[1]) if len(resolution) == 2 else None,
        resolution_unit=number(296, 2),
        ink_set=number(332, _CMYK_INKS),
        subsampling=(shared[0], shared[1]) if len(shared) == 2 else (2, 2),
        is_beside=is_reduced or bool(_NOT_THE_IMAGE.search(as_text(beginning))),
    )
