"""Where an image lies in its slide: polygons are written in the pixels of the slide."""

import re
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_NUMBER = r"\d+(?:[.,]\d+)?"
"""Programs write a decimal comma where the system does."""
_REGION = re.compile(rf"(?:[dxywhzt]=-?{_NUMBER},?)+")
_PART = re.compile(rf"([dxywhzt])=(-?{_NUMBER})")


@dataclass(frozen=True)
class Frame:
    """Pixels of a slide for those of an image: origin + downsample * pixel."""

    origin: tuple[float, float] = (0.0, 0.0)
    """x and y of the image's top left corner, in pixels of the slide."""
    downsample: tuple[float, float] = (1.0, 1.0)
    """Pixels of the slide for one of the image, along x and y."""

    def place(self, polygons: NDArray[np.object_]) -> NDArray[np.object_]:
        """Polygons of the image's pixels in the slide's."""
        if self == Frame():
            return polygons
        origin, downsample = np.array(self.origin), np.array(self.downsample)
        placed: NDArray[np.object_] = shapely.transform(
            polygons, lambda points: origin + downsample * points
        )
        return placed


def frame_in_name(name: str, width_px: int, height_px: int) -> Frame:
    """The frame that QuPath writes into the name of an image of a region.

    QuPath's export of tiles names them `slide [d=2,x=1024,y=2048,w=512,h=512].png`: x, y, w and h
    are in pixels of the slide, and d, the downsample, is left out where it is 1. Without it, the
    image's size tells the downsample from w and h.

    Args:
        name: of the file.
        width_px: of the image.
        height_px: of the image.

    Returns:
        The slide's frame; the image's own where the name says nothing.
    """
    for brackets in reversed(_BRACKETS.findall(name)):
        text = brackets.replace(" ", "")
        if not _REGION.fullmatch(text):
            continue
        found = _PART.findall(text)
        parts = {letter: float(number.replace(",", ".")) for letter, number in found}
        if {"x", "y"} <= parts.keys():
            across = parts.get("d", parts.get("w", 0.0) / width_px or 1.0)
            down = parts.get("d", parts.get("h", 0.0) / height_px or across)
            if min(across, down) > 0:
                return Frame((parts["x"], parts["y"]), (across, down))
    return Frame()
