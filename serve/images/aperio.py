"""The um per pixel in the description that Aperio's programs write into a page."""

import re

from serve.images.imagej import as_text
from serve.images.units import number

_MAX_BYTES = 2**16
_MPP = re.compile(r"\|\s*MPP\s*=\s*([0-9.,]{1,32})\s*(?:\||$)")
_SIZE = r"([1-9]\d{0,8})x([1-9]\d{0,8})"
_REDUCED = re.compile(rf"\n{_SIZE}(?: \[\d+,\d+ {_SIZE}\])?(?: \(\d+x\d+\))? -> {_SIZE}\b")
"""The sizes of the slide, of its part that is shown, and of the reduced page that shows it."""


def aperio_sides(description: bytes, page: tuple[int, int]) -> tuple[float, float] | None:
    """The um per pixel along x and y; None where the description is not Aperio's or lacks it.

    `MPP` counts in the slide's own pixels, also in the description of a thumbnail.

    Args:
        description: of the page.
        page: its width and height.
    """
    text = as_text(description[:_MAX_BYTES])
    found = _MPP.search(text) if text.startswith("Aperio") else None
    mpp = None if found is None else number(found[1])
    if mpp is None:
        return None
    sizes = _REDUCED.search(text)
    if sizes is None or (int(sizes[5]), int(sizes[6])) != page:
        return mpp, mpp
    shown = int(sizes[3] or sizes[1]), int(sizes[4] or sizes[2])
    return mpp * shown[0] / page[0], mpp * shown[1] / page[1]
