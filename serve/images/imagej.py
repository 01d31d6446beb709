"""What ImageJ, Fiji and QuPath write into a TIFF's description: lines of `key=value`."""

import re

MAX_BYTES = 2**16
_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")


def read_imagej(description: bytes) -> dict[str, str]:
    r"""Read the properties of a description; none if it is not of ImageJ's kind.

    Keys are lower case. Values are unescaped: ImageJ writes a micrometre as `\u00B5m`.
    """
    text = as_text(description[:MAX_BYTES])
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
