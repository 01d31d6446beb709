"""Slides in the layouts of Hamamatsu, NDPI and VMS, small and written here.

What the layouts are is told by OpenSlide's pages on formats. No scanner's own file is used.
"""

import io
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.support.vendor_tiffs import garish, shrunk

Pixels = NDArray[np.uint8]

_MCU_PX = 8
_RESTART_MCUS = 8
"""Blocks between two restart markers: OpenSlide's tiles are 64 x 8 pixels."""
_SHORT, _LONG, _RATIONAL, _SLONG, _FLOAT = 3, 4, 5, 9, 11
_ASCII = 2


def jpeg_with_restarts(pixels: Pixels) -> bytes:
    """A JPEG that can be decoded from each restart marker on; the width is a multiple of 64."""
    buffer = io.BytesIO()
    options = {"quality": 97, "subsampling": 0, "restart_marker_blocks": _RESTART_MCUS}
    Image.fromarray(pixels).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _restarts_in(jpeg: bytes) -> list[int]:
    """Where the parts of a JPEG begin: after its head and after each restart marker."""
    scan = jpeg.index(b"\xff\xda")
    start = scan + 2 + int.from_bytes(jpeg[scan + 2 : scan + 4], "big")
    return [
        start,
        *(start + match.end() for match in re.finditer(b"\xff[\xd0-\xd7]", jpeg[start:])),
    ]


def write_ndpi(
    path: Path,
    pixels: Pixels,
    *,
    mpp: tuple[float, float] = (0.25, 0.25),
    downsamples: Sequence[int] = (4,),
    has_restarts_listed: bool = True,
) -> Path:
    """Write a Hamamatsu NDPI: a TIFF with offsets of 64 bits, and one JPEG strip per level.

    Args:
        path: the file.
        pixels: (H, W, 3); sides are multiples of 64 on every level.
        mpp: um per pixel along x and y.
        downsamples: of the coarser levels.
        has_restarts_listed: whether the file says where the parts of its JPEGs begin.
    """
    images = [(shrunk(pixels, factor), 20.0 / factor, factor, 0) for factor in (1, *downsamples)]
    images.insert(1, (garish(*pixels.shape[:2]), 20.0, 1, 500))  # another focal plane
    images.append((garish(48, 128), -1.0, 32, 0))  # the macro image
    content = bytearray(b"II*\0" + bytes(8))
    link = 4  # where the place of the next directory is written
    for image, lens, factor, focus in images:
        jpeg = jpeg_with_restarts(image)
        place = _append(content, jpeg)
        height, width = image.shape[:2]
        per_cm = [round(1e9 / (side * factor)) for side in mpp]
        tags: list[tuple[int, int, int, bytes]] = [
            (256, _LONG, 1, struct.pack("<I", width)),
            (257, _LONG, 1, struct.pack("<I", height)),
            (258, _SHORT, 3, struct.pack("<3H", 8, 8, 8)),
            (259, _SHORT, 1, struct.pack("<H", 7)),
            (262, _SHORT, 1, struct.pack("<H", 6)),
            (271, _ASCII, 10, b"Hamamatsu\0"),
            (273, _LONG, 1, struct.pack("<I", place)),
            (277, _SHORT, 1, struct.pack("<H", 3)),
            (278, _LONG, 1, struct.pack("<I", height)),
            (279, _LONG, 1, struct.pack("<I", len(jpeg))),
            (282, _RATIONAL, 1, struct.pack("<2I", per_cm[0], 100_000)),
            (283, _RATIONAL, 1, struct.pack("<2I", per_cm[1], 100_000)),
            (296, _SHORT, 1, struct.pack("<H", 3)),
            (65420, _LONG, 1, struct.pack("<I", 1)),
            (65421, _FLOAT, 1, struct.pack("<f", lens)),
            (65424, _SLONG, 1, struct.pack("<i", focus)),
        ]
        if has_restarts_listed:
            starts = _restarts_in(jpeg)
            tags.append((65426, _LONG, len(starts), struct.pack(f"<{len(starts)}I", *starts)))
        link = _append_directory(content, tags, link)
    path.write_bytes(content)
    return path


def _append(content: bytearray, data: bytes) -> int:
    """Append at an even place, and say where."""
    content.extend(bytes(len(content) % 2))
    place = len(content)
    content.extend(data)
    return place


def _append_directory(
    content: bytearray, tags: Sequence[tuple[int, int, int, bytes]], link: int
) -> int:
    """Append a directory, link to it, and say where the link to the next one is."""
    entries = b"".join(
        struct.pack("<HHI", tag, kind, count)
        + (data.ljust(4, b"\0") if len(data) <= 4 else struct.pack("<I", _append(content, data)))
        for tag, kind, count, data in tags
    )
    high_words = bytes(4 * len(tags))  # of the values' places, all below 4 GB
    place = _append(content, struct.pack("<H", len(tags)) + entries + bytes(8) + high_words)
    content[link : link + 8] = struct.pack("<Q", place)
    return place + 2 + len(entries)


def write_vms(
    path: Path, pixels: Pixels, *, mpp: float = 0.25, grid: tuple[int, int] = (2, 2)
) -> Path:
    """Write a Hamamatsu VMS: a text file beside the JPEGs that it names.

    Args:
        path: the text file.
        pixels: (H, W, 3); each JPEG of the grid and the map have sides that are multiples of 64.
        mpp: um per pixel.
        grid: (rows, columns) of JPEGs.
    """
    height, width = pixels.shape[:2]
    rows, columns = grid
    part_height, part_width = height // rows, width // columns
    lines = [
        "[Virtual Microscope Specimen]",
        f"NoJpegColumns={columns}",
        f"NoJpegRows={rows}",
        f"PhysicalWidth={round(width * mpp * 1000)}",
        f"PhysicalHeight={round(height * mpp * 1000)}",
        "SourceLens=20",
    ]
    for row, column in np.ndindex(rows, columns):
        place = "" if row == column == 0 else f"({column},{row})"
        top, left = row * part_height, column * part_width
        part = np.ascontiguousarray(pixels[top : top + part_height, left : left + part_width])
        name = f"{path.stem}{place}.jpg"
        (path.parent / name).write_bytes(jpeg_with_restarts(part))
        lines.append(f"ImageFile{place}={name}")
    for key, name, image in (
        ("MapFile", f"{path.stem}_map2.jpg", shrunk(pixels, 4)),
        ("MacroImage", f"{path.stem}_macro.jpg", garish(64, 128)),
    ):
        (path.parent / name).write_bytes(jpeg_with_restarts(image))
        lines.append(f"{key}={name}")
    path.write_text("\n".join(lines) + "\n")
    return path


def write_vmu(path: Path, pixels: Pixels, *, mpp: float = 0.25) -> Path:
    """Write a Hamamatsu VMU: a text file beside two files of uncompressed colours of 12 bits.

    Args:
        path: the text file.
        pixels: (H, W, 3); the width is a multiple of 256.
        mpp: um per pixel.
    """
    height, width = pixels.shape[:2]
    lines = [
        "[Uncompressed Virtual Microscope Specimen]",
        f"PhysicalWidth={round(width * mpp * 1000)}",
        f"PhysicalHeight={round(height * mpp * 1000)}",
        "BitsPerPixel=36",
        "PixelOrder=RGB",
    ]
    for key, name, image in (
        ("ImageFile", f"{path.stem}.ngr", pixels),
        ("MapFile", f"{path.stem}_map.ngr", shrunk(pixels, 4)),
    ):
        _write_ngr(path.parent / name, image)
        lines.append(f"{key}={name}")
    path.write_text("\n".join(lines) + "\n")
    return path


def _write_ngr(path: Path, pixels: Pixels) -> None:
    """Write columns of 64 pixels one after the other."""
    height, width = pixels.shape[:2]
    head = struct.pack("<2s2x3i", b"GN", width, height, 64).ljust(24, b"\0") + struct.pack("<i", 64)
    columns = np.split(pixels.astype("<u2") * 16, width // 64, axis=1)
    path.write_bytes(head.ljust(64, b"\0") + b"".join(column.tobytes() for column in columns))
