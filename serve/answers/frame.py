"""Where an image lies in its slide: polygons are written in the pixels of the slide."""

import re
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

from serve.contract.errors import OptionError

_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_NUMBER = r"\d+(?:[.,]\d+)?"
"""Programs write a decimal comma where the system does."""
_REGION = re.compile(rf"(?:[dxywhzt]=-?{_NUMBER},?)+")
_PART = re.compile(rf"([dxywhzt])=(-?{_NUMBER})")

_SAME = 0.02
"""Share by which sizes may differ and still be the same (our choice)."""
_ROUNDED_PX = 2
"""Pixels by which sizes may differ because they were rounded."""


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


def frame_in_name(
    name: str, width_px: int, height_px: int, *, is_downsample_given: bool = False
) -> Frame:
    """The frame that QuPath writes into the name of an image of a region.

    QuPath's export of tiles names them `slide [d=2,x=1024,y=2048,w=512,h=512].png`: x, y, w and h
    are in pixels of the slide, and d, the downsample, is left out where it is 1. Without it, the
    image's size tells the downsample from w and h.

    Args:
        name: of the file.
        width_px: of the image.
        height_px: of the image.
        is_downsample_given: the name's does not count.

    Returns:
        The slide's frame; the image's own where the name says nothing.

    Raises:
        OptionError: the image was resized after its name was written, so that d is wrong.
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
                if not is_downsample_given and {"d", "w", "h"} <= parts.keys():
                    _refuse_resized(name, parts, width_px, height_px)
                return Frame((parts["x"], parts["y"]), (across, down))
    return Frame()


def _refuse_resized(name: str, parts: dict[str, float], width_px: int, height_px: int) -> None:
    """Raise OptionError where both sides of an image differ from its name's by the same factor."""
    width, height = parts["w"] / parts["d"], parts["h"] / parts["d"]
    factors = width_px / max(width, 1), height_px / max(height, 1)
    is_uniform = abs(factors[0] / factors[1] - 1) < _SAME
    is_resized = all(
        abs(size - named) > max(_SAME * named, _ROUNDED_PX)
        for size, named in ((width_px, width), (height_px, height))
    )
    if is_uniform and is_resized:
        raise OptionError(
            f"{name!r} names a region of {width:.0f} x {height:.0f} pixels at d={parts['d']:g}, "
            f"and the image has {width_px} x {height_px}. Was it resized or cut? State "
            "`downsample`, the pixels of the slide for one of the image, or rename the file."
        )
