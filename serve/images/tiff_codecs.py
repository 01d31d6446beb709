"""TIFF compressions that Pillow does not read as a whole: each strip or tile decoded on its own.

WebP, JPEG 2000 and PNG are decoded with Pillow, which has them. LERC and JPEG XL need imagecodecs
(80 MB installed), which the extra `slides` brings. A strip or tile whose own header tells another
size than the TIFF is refused before its pixels are decoded.
"""

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.contract.errors import ImageError
from serve.contract.extras import how_to_install
from serve.images.bombs import refuse_bombs
from serve.images.refusals import DECODER_ERRORS
from serve.images.tiff_pages import Page, read_pages, refuse_unstated
from serve.images.tiff_tags import MAX_PLACES, Structure

try:
    import imagecodecs
except ModuleNotFoundError:  # it comes with the extra `slides`
    imagecodecs = None  # type: ignore[assignment]

PILLOW_READS = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 34925, 50000})
"""Uncompressed, CCITT, LZW, JPEG, Deflate, PackBits, LZMA, Zstandard."""
_JPEG_2000 = (33003, 33005, 34712)
_NAMES = {
    **dict.fromkeys((9, 10, 34661), "JBIG"),
    **dict.fromkeys(_JPEG_2000, "JPEG 2000"),
    **dict.fromkeys((34676, 34677), "SGI Log"),
    **dict.fromkeys((34934, 22610), "JPEG XR"),
    **dict.fromkeys((50002, 52546), "JPEG XL"),
    **{32766: "NeXT", 32809: "ThunderScan", 34887: "LERC", 34933: "PNG"},
    **{48124: "Jetraw", 50001: "WebP"},
}
_APERIO_YCBCR = 33003
_YCBCR = 6
_OLD_JPEG = 6
_ICC_PROFILE = 34675
_MULTIPLIED = 1

_SEGMENT_ERRORS = (
    *DECODER_ERRORS,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What the decoders of strips and tiles raise on broken data."""

Decode = Callable[[bytes, tuple[int, int, int]], NDArray[np.uint8]]
"""From a segment's bytes and its (rows, columns, samples) to its pixels."""


def is_read_by_pillow(page: Page) -> bool:
    """Whether Pillow reads the page's compression."""
    return page.compression in PILLOW_READS


def decode_segments(data: bytes, page: Page) -> Image.Image:
    """Decode the first page of a TIFF, strip by strip or tile by tile.

    Args:
        data: the file; `page` is its first.
        page: what its tags say; its size has been found acceptable.

    Raises:
        ImageError: the compression is not read here, or a segment is damaged.
        struct.error: the file ends before what its tags name.
    """
    name = _NAMES.get(page.compression, "of an unknown kind")
    decode = _decoder(page.compression)
    if decode is None:
        is_extra = page.compression in _WITH_IMAGECODECS
        extra = f" without the extra `slides` ({how_to_install('slides')})" if is_extra else ""
        raise ImageError(
            f"The TIFF's compression is {name} (Compression {page.compression}), which is not read"
            f"{extra}. Save it with LZW, Deflate or JPEG compression, or as PNG.",
            code="image_compression",
        )
    if page.is_planar or page.num_samples not in (1, 3, 4) or not _is_plain_color(page):
        raise ImageError(
            f"The TIFF has {page.num_samples} channels, compressed by {name} in a layout that is "
            "not read. Save it as RGB with LZW or Deflate compression.",
            code="image_compression",
        )
    rows, columns, places = _segments(data, page)
    pixels = np.zeros((page.height, page.width, page.num_samples), np.uint8)
    for index, (offset, size) in enumerate(places):
        across = -(-page.width // columns)
        top, left = index // across * rows, index % across * columns
        if top >= page.height:
            break
        num_rows = rows if page.tile else min(rows, page.height - top)
        wanted = num_rows, columns, page.num_samples
        segment = _decoded(decode, data[offset : offset + size], wanted, name)
        part = pixels[top : top + rows, left : left + columns]
        part[...] = segment[: part.shape[0], : part.shape[1]]
    if page.photometric == 0:
        pixels = 255 - pixels
    image = _as_image(pixels, page, data[slice(places[0][0], sum(places[0]))])
    structure = Structure(data)
    for tag in structure.tags(structure.first):
        if tag.number == _ICC_PROFILE:
            image.info["icc_profile"] = structure.text(tag)
    return image


def _as_image(pixels: NDArray[np.uint8], page: Page, segment: bytes) -> Image.Image:
    """The pixels in the mode that says what their channels are; `segment` is the first."""
    if page.num_samples == 1:
        return Image.fromarray(pixels[..., 0])
    if page.num_samples == 4 and not page.extra_sample:  # not an alpha channel
        return Image.fromarray(pixels[..., :3].copy())
    if page.num_samples == 4:
        return Image.fromarray(pixels, "RGBa" if page.extra_sample == _MULTIPLIED else "RGBA")
    is_stated = page.compression == _APERIO_YCBCR or page.photometric == _YCBCR
    if page.compression in _JPEG_2000 and is_stated and not _is_transformed(segment):
        return Image.fromarray(pixels, "YCbCr")
    return Image.fromarray(pixels)


def _is_transformed(codestream: bytes) -> bool:
    """Whether a JPEG 2000 codestream has its own colour transform: its decoder gives RGB then.

    The marker COD of ISO/IEC 15444-1 (A.6.1) holds it after its length, style, progression and
    layers.
    """
    marker = codestream.find(b"\xff\x52")
    return 0 <= marker < len(codestream) - 8 and codestream[marker + 8] == 1


def _is_plain_color(page: Page) -> bool:
    """RGB or grey, or JPEG 2000's YCbCr."""
    is_jpeg_2000 = page.compression in _JPEG_2000
    return page.photometric in (0, 1, 2) or (page.photometric == _YCBCR and is_jpeg_2000)


def _decoded(
    decode: Decode, segment: bytes, wanted: tuple[int, int, int], name: str
) -> NDArray[np.uint8]:
    try:
        found = decode(segment, wanted)
    except ImageError:
        raise
    except _SEGMENT_ERRORS as error:
        raise ImageError(
            f"The TIFF is damaged: a part of it is no {name} that can be read ({error}). "
            "Write the file again.",
            code="image_damaged",
        ) from error
    if found.shape != wanted or found.dtype != np.uint8:
        raise _wrong_size(found.shape, wanted)
    return found


def check_segments(data: bytes, page: Page) -> None:
    """Raise ImageError where the first page of a TIFF lists fewer strips or tiles than it needs.

    Pillow leaves their pixels black, or takes other bytes for them.
    """
    structure = Structure(data)
    tags = {tag.number for tag in structure.tags(structure.first)}
    needed = {324, 325} if page.tile else {273, 279}  # old programs leave out the bytes of a strip
    if page.compression == _OLD_JPEG or not needed <= tags:
        return
    _, _, places = _segments(data, page)
    for index, (offset, size) in enumerate(places):
        if not offset or (not size and len(places) > 1):
            raise ImageError(
                f"The TIFF has no pixels in strip or tile {index + 1} of {len(places)}. Write it "
                "again.",
                code="image_damaged",
            )


def whole_tiff(data: bytes) -> bytes:
    """A TIFF as Pillow reads it, whose first page has all its strips or tiles.

    Raises:
        ImageError: it has not, or does not say what its pixels are.
        struct.error: it ends before what its tags name.
    """
    structure = Structure(data)
    first = read_pages(structure)[0]
    refuse_unstated(first)
    content = structure.with_first(structure.first)
    check_segments(content, first)
    return content


def _segments(data: bytes, page: Page) -> tuple[int, int, list[tuple[int, int]]]:
    """Rows and columns of a strip or tile, and where each is: its offset and bytes."""
    structure = Structure(data)
    tags = {tag.number: tag for tag in structure.tags(structure.first)}
    names = (324, 325) if page.tile else (273, 279)
    if not all(name in tags for name in names):
        raise ImageError("The TIFF does not say where its pixels are. Write the file again.")
    offsets, sizes = (
        [int(value) for value in structure.values(tags[name], MAX_PLACES)] for name in names
    )
    if page.tile:
        columns, rows = page.tile
    else:
        columns = page.width
        stated = structure.values(tags[278])[:1] if 278 in tags else ()
        rows = int(stated[0]) if stated else page.height
        rows = min(rows, page.height)
    rows = max(rows, 1)
    needed = -(-page.height // rows) * -(-page.width // columns)
    needed *= page.num_samples if page.is_planar else 1
    if len(offsets) < needed or len(sizes) < needed:
        raise ImageError(
            f"The TIFF has {len(offsets)} strips or tiles, expected {needed}. Write it again.",
            code="image_damaged",
        )
    return rows, columns, list(zip(offsets, sizes, strict=False))


def _wrong_size(found: tuple[int, ...], wanted: tuple[int, int, int]) -> ImageError:
    return ImageError(
        f"The TIFF is damaged: a strip or tile has the shape {found}, expected {wanted}. Write the "
        "file again.",
        code="image_damaged",
    )


def _with_pillow(kind: str) -> Decode:
    def decode(segment: bytes, wanted: tuple[int, int, int]) -> NDArray[np.uint8]:
        refuse_bombs(segment)
        with Image.open(io.BytesIO(segment), formats=(kind,)) as image:
            found = (image.height, image.width, len(image.getbands()))
            if found[:2] != wanted[:2]:  # known from its header: nothing is decoded
                raise _wrong_size(found, wanted)
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"it has more than 8 bits per channel, mode {image.mode}")
            mode = {1: "L", 3: "RGB", 4: "RGBA"}[wanted[2]]
            if image.mode == "YCbCr":
                mode = "YCbCr"
            return np.asarray(image.convert(mode), np.uint8).reshape(wanted)

    return decode


def _with_imagecodecs(kind: str) -> Decode:
    def decode(segment: bytes, wanted: tuple[int, int, int]) -> NDArray[np.uint8]:
        out = np.empty(wanted if wanted[2] > 1 else wanted[:2], np.uint8)
        getattr(imagecodecs, f"{kind}_decode")(segment, out=out)  # refuses another shape
        return out.reshape(wanted)

    return decode


_WITH_PILLOW = {**dict.fromkeys(_JPEG_2000, "JPEG2000"), 34933: "PNG", 50001: "WEBP"}
_WITH_IMAGECODECS = {34887: "lerc", 50002: "jpegxl", 52546: "jpegxl"}


def _decoder(compression: int) -> Decode | None:
    if compression in _WITH_PILLOW:
        return _with_pillow(_WITH_PILLOW[compression])
    if compression in _WITH_IMAGECODECS and imagecodecs is not None:
        return _with_imagecodecs(_WITH_IMAGECODECS[compression])
    return None
