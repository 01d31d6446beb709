"""What programs write into a TIFF's description: Aperio's, lines of ImageJ, or an OME-TIFF's XML.

The XML is parsed with expat and never trusted: a document type, and with it every entity, ends
the reading, and so does damage. What was read until then counts.
"""

import contextlib
import re
from dataclasses import dataclass, field
from xml.parsers import expat

from serve.images.units import number

_MAX_TEXT_BYTES = 2**16
"""Of Aperio's and ImageJ's text, what is read."""
_MAX_XML_BYTES = 2**20
"""Of OME-XML, what is read. The longest of microscopes have some 100 kB."""
_MAX_IMAGES = 256
_MAX_CHANNELS = 64
"""Per image."""
_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")
_APERIO_MPP = re.compile(r"\|\s*MPP\s*=\s*([0-9.,eE+-]{1,32})\s*(?:\||$)")
_SIZE = r"([1-9]\d{0,8})x([1-9]\d{0,8})"
_APERIO_REDUCED = re.compile(rf"\n{_SIZE}(?: \[\d+,\d+ {_SIZE}\])?(?: \(\d+x\d+\))? -> {_SIZE}\b")
"""The sizes of the slide, of its part that is shown, and of the reduced page that shows it."""


def aperio_sides(description: bytes, page: tuple[int, int]) -> tuple[float, float] | None:
    """The um per pixel along x and y; None where the description is not Aperio's or lacks it.

    `MPP` counts in the slide's own pixels, also in the description of a thumbnail.

    Args:
        description: of the page.
        page: its width and height.
    """
    text = as_text(description[:_MAX_TEXT_BYTES])
    found = _APERIO_MPP.search(text) if text.startswith("Aperio") else None
    mpp = None if found is None else number(found[1])
    if mpp is None:
        return None
    sizes = _APERIO_REDUCED.search(text)
    if sizes is None or (int(sizes[5]), int(sizes[6])) != page:
        return mpp, mpp
    shown = int(sizes[3] or sizes[1]), int(sizes[4] or sizes[2])
    return mpp * shown[0] / page[0], mpp * shown[1] / page[1]


def read_imagej(description: bytes) -> dict[str, str]:
    r"""Read what ImageJ, Fiji and QuPath write, `key=value`; nothing if it is not of their kind.

    Keys are lower case. Values are unescaped: ImageJ writes a micrometre as `\u00B5m`.
    """
    text = as_text(description[:_MAX_TEXT_BYTES])
    lines = [line.partition("=") for line in text.splitlines() if "=" in line]
    properties = {
        key.strip().lower(): _ESCAPE.sub(lambda found: chr(int(found[1], 16)), value.strip())
        for key, _, value in lines
    }
    return properties if "imagej" in properties or "unit" in properties else {}


def as_text(description: bytes) -> str:
    """A description as text: UTF-8, or Latin-1 as older programs wrote it."""
    trimmed = description.rstrip(b"\0")
    try:
        return trimmed.decode("utf-8")
    except UnicodeDecodeError:
        return trimmed.decode("latin-1")


@dataclass
class OmeImage:
    """One `Pixels` element."""

    attributes: dict[str, str]
    channels: list[dict[str, str]] = field(default_factory=list)
    planes: list[dict[str, str]] = field(default_factory=list)
    """The attributes of its `TiffData` elements."""
    files: set[str] = field(default_factory=set)
    """The UUIDs of the files with its pages, where they are stated."""

    def size(self, axis: str) -> int:
        """Pixels, channels, planes or times along X, Y, C, Z or T; 1 where it is not stated."""
        text = self.attributes.get(f"Size{axis}", "1")
        return int(text) if text.isdecimal() and len(text) < 10 else 1


class _Stop(ValueError):
    """The text goes beyond what an OME-TIFF needs."""


def read_ome(description: bytes) -> list[OmeImage]:
    """Read the images that a description states; none if it is not OME-XML.

    Of a set of files, which all state the images of the whole set, those that have no page in this
    file are left out.
    """
    if b"<" not in description[:64] or b"Pixels" not in description[:_MAX_XML_BYTES]:
        return []
    images: list[OmeImage] = []
    own, texts = "", list[str]()

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal own
        kind = name.rpartition(":")[2]
        if kind == "OME":
            own = attributes.get("UUID", "")
        elif kind == "UUID" and images:
            texts.clear()
        elif kind == "Pixels":
            if len(images) == _MAX_IMAGES:
                raise _Stop
            images.append(OmeImage(attributes))
        elif images and kind == "Channel" and len(images[-1].channels) < _MAX_CHANNELS:
            images[-1].channels.append(attributes)
        elif images and kind == "TiffData" and len(images[-1].planes) < _MAX_CHANNELS:
            images[-1].planes.append(attributes)

    def end(name: str) -> None:
        if name.rpartition(":")[2] == "UUID" and images:
            images[-1].files.add("".join(texts).strip())

    def refuse(*_: object) -> None:
        raise _Stop

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = texts.append
    parser.StartDoctypeDeclHandler = refuse
    # An odd encoding is a ValueError or LookupError.
    with contextlib.suppress(expat.ExpatError, _Stop, ValueError, LookupError):
        parser.Parse(description[:_MAX_XML_BYTES].strip(b"\0 \r\n\t"), True)
    return [image for image in images if not image.files or own in image.files] or images


def image_of_size(images: list[OmeImage], width: int, height: int) -> OmeImage | None:
    """The image that a page of a size belongs to: the first of that size, or else the first."""
    fitting = (image for image in images if (image.size("X"), image.size("Y")) == (width, height))
    return next(fitting, images[0] if images else None)
