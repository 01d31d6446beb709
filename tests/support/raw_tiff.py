"""TIFFs that say exactly what a test wants them to say, right or wrong."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

SHORT, LONG = 3, 4
Tags = Mapping[int, int | Sequence[int] | None]


@dataclass(frozen=True)
class RawPage:
    """A page: its tags of whole numbers, its strips or tiles, and the pages in its SubIFDs."""

    tags: Tags
    segments: Sequence[bytes] = ()
    below: Sequence["RawPage"] = field(default=())


def raw_page(
    pixels: NDArray[np.uint8], *, below: Sequence[RawPage] = (), **tags: object
) -> RawPage:
    """A page of (H, W) or (H, W, C) pixels in one strip; `tags` as t262=1, None leaves one out."""
    height, width, *rest = pixels.shape
    samples = rest[0] if rest else 1
    plain = {
        256: width, 257: height, 258: [8] * samples, 259: 1, 262: 2 if samples > 1 else 1,
        277: samples, 278: height,
    }  # fmt: skip
    segments = tags.pop("segments", None) or [pixels.tobytes()]
    changed = {int(name[1:]): value for name, value in tags.items()}
    return RawPage({**plain, **changed}, segments, below)


def raw_tiff(*pages: RawPage) -> bytes:
    """A little-endian classic TIFF of pages."""
    out = bytearray(struct.pack("<2sHL", b"II", 42, 0))
    place_of_next = 4
    for page in pages:
        start = _write(out, page)
        struct.pack_into("<L", out, place_of_next, start)
        place_of_next = len(out) - 4
    return bytes(out)


def _write(out: bytearray, page: RawPage) -> int:
    """Append a page, whose folder comes last; where that is."""
    places = []
    for segment in page.segments:
        places.append(len(out))
        out += segment + b"\0" * (len(segment) % 2)
    tags = dict(page.tags)
    offsets, sizes = (324, 325) if 322 in tags else (273, 279)
    tags = {offsets: places, sizes: [len(segment) for segment in page.segments], **tags}
    if page.below:
        tags[330] = [_write(out, below) for below in page.below]
    entries = []
    for number, value in sorted(tags.items()):
        if value is None:
            continue
        values = list(value) if isinstance(value, Sequence) else [value]
        kind = LONG if number in (256, 257, 273, 278, 279, 324, 325, 330) else SHORT
        packed = struct.pack(f"<{len(values)}{'L' if kind == LONG else 'H'}", *values)
        if len(packed) > 4:
            packed, here = struct.pack("<L", len(out)), packed
            out += here + b"\0" * (len(here) % 2)
        entries.append(struct.pack("<HHL", number, kind, len(values)) + packed.ljust(4, b"\0"))
    start = len(out)
    out += struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return start
