"""Slides in the layout of Zeiss CZI, small and written here.

What the layout is is told by OpenSlide's source. No scanner's own file is used.
"""

import io
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.support.vendor_tiffs import Region, garish, shrunk

Pixels = NDArray[np.uint8]

BGR24, BGR48 = 3, 4
_STEP_PX, _TILE_PX = 56, 64
"""Tiles of level 0 overlap by 8 pixels."""
_ORIGIN_PX = -500
"""Where the file counts from: the stage's coordinates, which may be negative."""
_HEAD_BYTES = 288
"""Of a subblock and of an attachment, before their data."""
_ID = bytes(range(16))


class _Writer:
    """The file, as it grows."""

    def __init__(self) -> None:
        self.content = bytearray(32 + 512)
        self.entries: list[bytes] = []

    def segment(self, name: str, body: bytes) -> int:
        """Append a segment; where it is."""
        place = len(self.content)
        body += bytes(-len(body) % 32)
        self.content += struct.pack("<16s2q", name.encode(), len(body), len(body)) + body
        return place

    def subblock(self, pixels: NDArray[np.uint8 | np.uint16], region: Region, scene: int) -> None:
        """Append the pixels of a region; fewer of them than it has are a coarser level."""
        kind = BGR24 if pixels.dtype == np.uint8 else BGR48
        height, width = pixels.shape[:2]
        places = (
            (b"X", _ORIGIN_PX + region.x, region.width, width),
            (b"Y", _ORIGIN_PX + region.y, region.height, height),
            (b"S", scene, 1, 1),
            (b"M", len(self.entries), 1, 1),
        )
        entry = struct.pack(
            "<2siqiibB4si", b"DV", kind, len(self.content), 0, 0, 0, 0, bytes(4), len(places)
        ) + b"".join(
            struct.pack("<4siifi", name, start, size, 0.0, stored)
            for name, start, size, stored in places
        )
        self.entries.append(entry)
        data = np.ascontiguousarray(pixels[..., ::-1]).tobytes()
        head = struct.pack("<iiq", 0, 0, len(data)) + entry
        self.segment("ZISRAWSUBBLOCK", head.ljust(_HEAD_BYTES - 32, b"\0") + data)


def write_zeiss(
    path: Path,
    pixels: Pixels,
    scenes: Sequence[Region],
    *,
    mpp: float = 0.25,
    downsamples: Sequence[int] = (2, 4),
    is_deep: bool = False,
) -> Path:
    """Write a Zeiss CZI: scenes of tiles that overlap, and a coarser picture of each scene.

    Args:
        path: the file.
        pixels: (H, W, 3) of the whole slide.
        scenes: which parts of it are in the file; sides are multiples of 8, and some scene begins
            at x 0, some at y 0.
        mpp: um per pixel.
        downsamples: of the coarser levels.
        is_deep: whether colours have 16 bits.
    """
    writer = _Writer()
    for number, scene in enumerate(scenes):
        part = pixels[scene.rows_and_columns]
        for top in range(0, scene.height, _STEP_PX):
            for left in range(0, scene.width, _STEP_PX):
                tile = part[top : top + _TILE_PX, left : left + _TILE_PX]
                place = Region(scene.x + left, scene.y + top, tile.shape[1], tile.shape[0])
                writer.subblock(tile.astype(np.uint16) * 64 if is_deep else tile, place, number)
        for factor in downsamples:
            level = shrunk(part, factor)
            writer.subblock(level.astype(np.uint16) * 64 if is_deep else level, scene, number)
    directory = struct.pack("<i124x", len(writer.entries)) + b"".join(writer.entries)
    directory_place = len(writer.content)
    writer.content += struct.pack("<16s2q", b"ZISRAWDIRECTORY", len(directory), len(directory))
    writer.content += directory
    text = _metadata(scenes, mpp, "Bgr48" if is_deep else "Bgr24")
    text_place = writer.segment("ZISRAWMETADATA", struct.pack("<ii248x", len(text), 0) + text)
    attachments_place = _attach_label(writer)
    writer.content[: 32 + 80] = struct.pack("<16s2q", b"ZISRAWFILE", 512, 512) + struct.pack(
        "<4i16s16siqqiq",
        *(1, 0, 0, 0, _ID, _ID, 0, directory_place, text_place, 0, attachments_place),
    )
    path.write_bytes(writer.content)
    return path


def _attach_label(writer: _Writer) -> int:
    """Append a picture of the label, and the list that has it; where the list is."""
    buffer = io.BytesIO()
    Image.fromarray(garish(48, 64)).save(buffer, "JPEG")
    data = buffer.getvalue()
    entry = struct.pack("<2s10xqi16s8s80s", b"A1", len(writer.content), 0, _ID, b"JPG", b"Label")
    head = struct.pack("<i12x", len(data)) + entry
    writer.segment("ZISRAWATTACH", head.ljust(_HEAD_BYTES - 32, b"\0") + data)
    return writer.segment("ZISRAWATTDIR", struct.pack("<i252x", 1) + entry)


def _metadata(scenes: Sequence[Region], mpp: float, pixel_type: str) -> bytes:
    width = max(scene.x + scene.width for scene in scenes)
    height = max(scene.y + scene.height for scene in scenes)
    distances = "".join(
        f'<Distance Id="{axis}"><Value>{mpp * 1e-6:.9E}</Value></Distance>' for axis in "XY"
    )
    return (
        "<ImageDocument><Metadata><Information><Image>"
        f"<PixelType>{pixel_type}</PixelType><SizeX>{width}</SizeX><SizeY>{height}</SizeY>"
        f"<SizeS>{len(scenes)}</SizeS></Image></Information>"
        f"<Scaling><Items>{distances}</Items></Scaling></Metadata></ImageDocument>"
    ).encode()
