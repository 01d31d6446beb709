"""What an OME-TIFF says in its first page's description: sizes, channels and pixel sizes.

The text is parsed with expat and never trusted: a document type, and with it every entity, ends
the reading, and so does damage. What was read until then counts.
"""

import contextlib
from dataclasses import dataclass, field
from xml.parsers import expat

MAX_BYTES = 2**20
"""Of a description, what is read. The longest of microscopes have some 100 kB."""
MAX_IMAGES = 256
MAX_CHANNELS = 64
"""Per image."""


@dataclass
class OmeImage:
    """One `Pixels` element."""

    attributes: dict[str, str]
    channels: list[dict[str, str]] = field(default_factory=list)
    planes: list[dict[str, str]] = field(default_factory=list)
    """The attributes of its `TiffData` elements."""

    def size(self, axis: str) -> int:
        """Pixels, channels, planes or times along X, Y, C, Z or T; 1 where it is not stated."""
        text = self.attributes.get(f"Size{axis}", "1")
        return int(text) if text.isdecimal() and len(text) < 10 else 1


class _Stop(ValueError):
    """The text goes beyond what an OME-TIFF needs."""


def read_ome(description: bytes) -> list[OmeImage]:
    """Read the images that a description states; none if it is not OME-XML."""
    if b"<" not in description[:64] or b"Pixels" not in description[:MAX_BYTES]:
        return []
    images: list[OmeImage] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        kind = name.rpartition(":")[2]
        if kind == "Pixels":
            if len(images) == MAX_IMAGES:
                raise _Stop
            images.append(OmeImage(attributes))
        elif images and kind == "Channel" and len(images[-1].channels) < MAX_CHANNELS:
            images[-1].channels.append(attributes)
        elif images and kind == "TiffData" and len(images[-1].planes) < MAX_CHANNELS:
            images[-1].planes.append(attributes)

    def refuse(*_: object) -> None:
        raise _Stop

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.StartDoctypeDeclHandler = refuse
    # An odd encoding is a ValueError or LookupError.
    with contextlib.suppress(expat.ExpatError, _Stop, ValueError, LookupError):
        parser.Parse(description[:MAX_BYTES].strip(b"\0 \r\n\t"), True)
    return images


def image_of_size(images: list[OmeImage], width: int, height: int) -> OmeImage | None:
    """The image that a page of a size belongs to: the first of that size, or else the first."""
    fitting = (image for image in images if (image.size("X"), image.size("Y")) == (width, height))
    return next(fitting, images[0] if images else None)
