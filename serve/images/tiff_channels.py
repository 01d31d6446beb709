"""Which of three channels is red, green and blue, where a TIFF's metadata says so."""

import re
import struct
from collections.abc import Sequence

from serve.images.descriptions import OmeImage, read_imagej
from serve.images.tiff_tags import Structure

_COLORS = {"r": "red", "g": "green", "b": "blue", "red": "red", "green": "green", "blue": "blue"}
RGB_COLORS = ("red", "green", "blue")
_HEX_COLORS = {"ff0000": "red", "00ff00": "green", "0000ff": "blue"}
_NO_NAME = re.compile(r"(?:channel|ch|c)?[\d\s:_.#-]*", re.IGNORECASE)
"""What programs call channels that nobody named."""
_FLUORESCENCE = frozenset({"EmissionWavelength", "ExcitationWavelength", "Fluor"})
"""OME's attributes of channels that were not seen in transmitted light."""
_IMAGEJ_COUNTS, _IMAGEJ_DATA = 50838, 50839
_IMAGEJ_LUT, _IMAGEJ_LABEL = b"luts", b"labl"
_LUT_BYTES = 768


def stated_order(
    structure: Structure, description: bytes, ome: OmeImage | None
) -> list[int] | None:
    """Which of three channels is red, green and blue; None where the metadata do not say it."""
    return rgb_order(_ome_colors(ome) or _imagej_colors(structure, description) or ())


def rgb_order(colors: Sequence[str]) -> list[int] | None:
    """Which of three channels of these colours is red, green and blue; None if they are not."""
    if sorted(colors) != sorted(RGB_COLORS):
        return None
    return [colors.index(color) for color in RGB_COLORS]


def color_of(name: str, shown: str) -> str:
    """The colour of a channel by its name, or of one without by how it is shown, as #rrggbb.

    Empty if it has none: a stain that is shown in red is not the red of a brightfield image.
    """
    if _NO_NAME.fullmatch(name.strip()):
        return _HEX_COLORS.get(shown.strip().lstrip("#").casefold(), "")
    return _COLORS.get(name.strip().casefold(), "")


def _ome_colors(image: OmeImage | None) -> list[str] | None:
    """The colour of each plane in the file's order, by its channel's name or colour."""
    if image is None or (image.size("C"), image.size("Z"), image.size("T")) != (3, 1, 1):
        return None
    if len(image.channels) == 1 and image.channels[0].get("SamplesPerPixel") == "3":
        return list(RGB_COLORS)
    colors = [_channel_color(channel) for channel in image.channels]
    if len(image.planes) != 3 or len(colors) != 3:
        return colors
    channel_of = {plane.get("IFD", ""): plane.get("FirstC", "0") for plane in image.planes}
    if set(channel_of) == set(channel_of.values()) == set("012"):
        return [colors[int(channel_of[page])] for page in "012"]
    return colors


def _channel_color(channel: dict[str, str]) -> str:
    stated = channel.get("Color", "")
    is_number = stated.removeprefix("-").isdecimal() and len(stated) < 12
    shown = f"{int(stated) >> 8 & 0xFFFFFF:06x}" if is_number else ""
    return "" if _FLUORESCENCE & channel.keys() else color_of(channel.get("Name", ""), shown)


def _imagej_colors(structure: Structure, description: bytes) -> list[str] | None:
    """The colours of ImageJ's three channels or labelled slices, in the file's order."""
    properties = read_imagej(description)
    if "imagej" not in properties or properties.get("images") != "3":
        return None
    metadata = _imagej_metadata(structure)
    encoding = "utf-16-le" if structure.order == "<" else "utf-16-be"
    labels = [text.decode(encoding, "replace") for text in metadata.get(_IMAGEJ_LABEL, [])]
    named = [_COLORS.get(label.strip("\0 ").casefold(), "") for label in labels]
    if len(named) == 3 and all(named):
        return named
    if properties.get("channels") != "3":
        return None
    if tables := metadata.get(_IMAGEJ_LUT):
        return [_lut_color(table) for table in tables]
    return list(RGB_COLORS) if properties.get("mode") == "composite" else None


def _lut_color(table: bytes) -> str:
    """Which of red, green and blue a lookup table of 256 reds, greens and blues shows."""
    if len(table) != _LUT_BYTES:
        return ""
    ramp, nothing = bytes(range(256)), bytes(256)
    shown = [table[start : start + 256] for start in (0, 256, 512)]
    for index, color in enumerate(RGB_COLORS):
        if shown == [ramp if place == index else nothing for place in range(3)]:
            return color
    return ""


def _imagej_metadata(structure: Structure) -> dict[bytes, list[bytes]]:
    """ImageJ's own metadata of the first page: the values of each kind."""
    tags = {tag.number: tag for tag in structure.tags(structure.first)}
    if not {_IMAGEJ_COUNTS, _IMAGEJ_DATA} <= tags.keys():
        return {}
    sizes = [int(value) for value in structure.values(tags[_IMAGEJ_COUNTS])]
    data = structure.text(tags[_IMAGEJ_DATA])
    if not sizes or not 4 <= sizes[0] <= len(data):
        return {}
    header, place, rest = data[: sizes[0]], sizes[0], iter(sizes[1:])
    found: dict[bytes, list[bytes]] = {}
    for start in range(4, len(header) - 7, 8):
        kind = header[start : start + 4]
        (count,) = struct.unpack(structure.order + "L", header[start + 4 : start + 8])
        kind = kind if structure.order == ">" else kind[::-1]
        for size in (size for size, _ in zip(rest, range(count), strict=False)):
            found.setdefault(kind, []).append(data[place : place + size])
            place += size
    return found
