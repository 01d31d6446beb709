"""A TIFF's structure: its pages and their tags, read within limits and without any pixel.

Classic TIFF and BigTIFF in both byte orders (TIFF 6.0; BigTIFF as libtiff defines it).
"""

import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

STARTS = (b"II*\0", b"II\0*", b"II+\0", b"MM\0*", b"MM*\0", b"MM\0+")
"""As Pillow takes them, wrong ones among them; with a `+` it is a BigTIFF."""
MAX_TAGS = 4_096
"""Tags of one folder that are looked at."""
MAX_PAGES = 1_024
"""Pages that are looked at."""
MAX_VALUES = 4_096
"""Values of one tag that are read here."""
MAX_TEXT_BYTES = 2**20
MAX_PLACES = 131_072
"""Strips or tiles of one page that are looked at."""
_FORMATS = {
    1: "B", 2: "s", 3: "H", 4: "L", 6: "b", 7: "s", 8: "h", 9: "l", 11: "f", 12: "d", 13: "L",
    16: "Q", 17: "q", 18: "Q",
}  # fmt: skip
_SIZES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_LONG, _LONG8 = 4, (16, 17, 18)
_PLACES = (273, 279, 324, 325)
"""Offsets and sizes of strips and tiles."""
_SHORT = 3
_SUB_FOLDERS = 330
_RATIONALS = (5, 10)


@dataclass(frozen=True)
class Tag:
    """An entry of a folder of tags."""

    number: int
    kind: int
    num_values: int
    value: int
    """Where the values are, or of a folder of tags where it is."""
    place: int
    """Where the value's field is in the file."""


class FileBytes:
    """The bytes of an open file, which are read where they are asked for.

    They are not mapped into memory: that would end the process where another one cuts the file
    short, or a disk or share fails.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._size)
        self._file.seek(start)
        return self._file.read(max(stop - start, 0))


class Structure:
    """A TIFF's bytes, read tag by tag.

    Raises:
        struct.error: (every method) the file ends before what it names.
    """

    def __init__(self, data: bytes | FileBytes) -> None:
        self.data = data
        self.order = "<" if data[:2] == b"II" else ">"
        self.is_big = b"+" in data[2:4]
        self._first_place = 8 if self.is_big else 4

    @property
    def first(self) -> int:
        """Where the first page's folder is."""
        return self._offset(self._first_place)

    def with_first(self, folder: int, replaced: Mapping[int, int | None] | None = None) -> bytes:
        """The file with another page as its first, so that readers of the first read that one.

        Args:
            folder: where the page's tags are.
            replaced: new values of its tags of one short number; None leaves the tag out.

        Returns:
            The file, with a folder of a classic TIFF at its end where tags change, or where it is
            a big-endian BigTIFF, which Pillow does not read.
        """
        if replaced or (self.is_big and self.order == ">"):
            return self._as_classic(folder, replaced or {})
        if folder == self.first:
            return self.data[:]
        field = self._pack("Q" if self.is_big else "L", folder)
        end = self._first_place + len(field)
        return self.data[: self._first_place] + field + self.data[end:]

    def _as_classic(self, folder: int, replaced: Mapping[int, int | None]) -> bytes:
        """A classic TIFF around the same bytes: its only folder and what that needs at the end."""
        kept = [tag for tag in self.tags(folder) if replaced.get(tag.number, 0) is not None]
        parts, end = [b"", b"\0" * (-len(self.data) % 4)], -(-len(self.data) // 4) * 4
        entries = []
        for tag in kept:
            kind, count, field = tag.kind, tag.num_values, self._pack("L", 0)
            if replaced.get(tag.number) is not None:
                kind, count, field = _SHORT, 1, self._pack("HH", replaced[tag.number] or 0, 0)
            elif kind in _LONG8:
                if tag.num_values > MAX_VALUES and tag.number not in _PLACES:
                    continue
                values = [int(value) for value in self.values(tag, MAX_PLACES)]
                kind, count, block = _LONG, len(values), self._pack("L" * len(values), *values)
                field = block if count == 1 else self._pack("L", end)
                if count > 1:
                    parts.append(block)
                    end += len(block)
            elif self._size(tag) <= 4:
                field = self.data[tag.place : tag.place + 4]
            else:
                field = self._pack("L", self._place(tag))
            entries.append(self._pack("HHL", tag.number, kind, count) + field)
        header = self.data[:2] + self._pack("HL", 42, end)
        parts[0] = header + self.data[len(header) :]
        return b"".join([*parts, self._pack("H", len(entries)), *entries, self._pack("L", 0)])

    def num_tags(self, folder: int) -> int:
        """How many tags a folder says it has."""
        return int(self._unpack("Q" if self.is_big else "H", folder)[0])

    def tags(self, folder: int) -> Iterator[Tag]:
        """The tags of the folder at a place; of more than MAX_TAGS the first."""
        entry = "HHQQ" if self.is_big else "HHLL"
        size = struct.calcsize(self.order + entry)
        start = folder + (8 if self.is_big else 2)
        for index in range(min(self.num_tags(folder), MAX_TAGS)):
            at = start + index * size
            number, kind, num_values, value = self._unpack(entry, at)
            field = at + (12 if self.is_big else 8)
            yield Tag(number, kind, num_values, value, field)

    def folders(self) -> Iterator[int]:
        """Where each page's folder is, from the first; of more than MAX_PAGES the first."""
        place, seen = self.first, set[int]()
        while place and place not in seen and len(seen) < MAX_PAGES:
            seen.add(place)
            yield place
            size = 20 if self.is_big else 12
            place = self._offset(place + (8 if self.is_big else 2) + self.num_tags(place) * size)

    def all_folders(self) -> Iterator[int]:
        """Where the folders of all pages are; behind each page, those of its SubIFDs.

        TIFF/EP has the image there, behind a thumbnail; pyramids have their smaller levels there.
        """
        seen = set[int]()
        for folder in self.folders():
            for place in (folder, *self._below(folder)):
                if place not in seen and len(seen) < MAX_PAGES:
                    seen.add(place)
                    yield place

    def _below(self, folder: int) -> list[int]:
        """Where the SubIFDs of a folder are; those beyond the end of the file are left out."""
        found = next((tag for tag in self.tags(folder) if tag.number == _SUB_FOLDERS), None)
        places = () if found is None else self.values(found)
        return [int(place) for place in places if self._is_folder(int(place))]

    def _is_folder(self, place: int) -> bool:
        try:
            return place > 0 and all(tag.number > 0 for tag in self.tags(place))
        except struct.error:
            return False

    def values(self, tag: Tag, limit: int = MAX_VALUES) -> tuple[float, ...]:
        """A tag's numbers, at most `limit`; none for text and for kinds that are not known."""
        count, place = min(tag.num_values, limit), self._place(tag)
        if tag.kind in _RATIONALS:
            pairs = self._unpack(("LL" if tag.kind == 5 else "ll") * count, place)
            return tuple(
                top / bottom if bottom else 0.0
                for top, bottom in zip(pairs[::2], pairs[1::2], strict=True)
            )
        letter = _FORMATS.get(tag.kind, "s")
        values = () if letter == "s" else self._unpack(f"{count}{letter}", place)
        return tuple(value if math.isfinite(value) else 0.0 for value in values)

    def text(self, tag: Tag) -> bytes:
        """A tag's bytes, cut at MAX_TEXT_BYTES."""
        place = self._place(tag)
        return self.data[place : place + min(tag.num_values, MAX_TEXT_BYTES)]

    def _size(self, tag: Tag) -> int:
        """Bytes of a tag's values."""
        return tag.num_values * _SIZES.get(tag.kind, 1)

    def _place(self, tag: Tag) -> int:
        """Where a tag's values are: in its field where they fit."""
        return tag.place if self._size(tag) <= (8 if self.is_big else 4) else tag.value

    def _pack(self, formats: str, *values: int) -> bytes:
        return struct.pack(self.order + formats, *values)

    def _offset(self, place: int) -> int:
        return int(self._unpack("Q" if self.is_big else "L", place)[0])

    def _unpack(self, formats: str, place: int) -> tuple[int, ...]:
        if place < 0 or place > len(self.data):  # a slice takes the first from the end
            raise struct.error(f"offset {place} of {len(self.data)} bytes")
        end = place + struct.calcsize(self.order + formats)
        return struct.unpack(self.order + formats, self.data[place:end])
