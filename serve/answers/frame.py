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
    are in pixels of the slide, and d, the downsample, is left out where it is 1. At the slide's
    edges, w and h are what of the tile is on the slide, and the image is filled up. Without d, the
    image's size tells the downsample from w and h, if along both axes the same.

    Args:
        name: of the file.
        width_px: of the image.
        height_px: of the image.
        is_downsample_given: the name's does not count.

    Returns:
        The slide's frame; the image's own where the name says nothing.

    Raises:
        OptionError: the image was resized, turned or cut after its name was written.
    """
    for brackets in reversed(_BRACKETS.findall(name)):
        text = brackets.replace(" ", "")
        if not _REGION.fullmatch(text):
            continue
        parts = {letter: float(part.replace(",", ".")) for letter, part in _PART.findall(text)}
        if {"x", "y"} <= parts.keys():
            named, size = (parts.get("w", 0.0), parts.get("h", 0.0)), (width_px, height_px)
            downsample = (parts["d"], parts["d"]) if "d" in parts else _downsample(named, size)
            if min(downsample) > 0:
                if not is_downsample_given and min(named) > 0:
                    _refuse_changed(name, named, downsample, size)
                return Frame((parts["x"], parts["y"]), downsample)
    return Frame()


def _downsample(named: tuple[float, float], size: tuple[int, int]) -> tuple[float, float]:
    """Pixels of the slide for one of the image, by the width and height that its name has."""
    across = named[0] / size[0] or 1.0
    down = named[1] / size[1] or across
    is_rounded = abs(named[1] / across - size[1]) <= _ROUNDED_PX
    return (across, down) if abs(across / down - 1) < _SAME or is_rounded else (1.0, 1.0)


def _refuse_changed(
    name: str, named: tuple[float, float], downsample: tuple[float, float], size: tuple[int, int]
) -> None:
    """Raise OptionError where both sides of an image differ from its name's, and no fill is why."""
    width, height = (length / step for length, step in zip(named, downsample, strict=True))
    factors = size[0] / max(width, 1), size[1] / max(height, 1)
    is_uniform = abs(factors[0] / factors[1] - 1) < _SAME
    is_changed = all(
        abs(found - expected) > max(_SAME * expected, _ROUNDED_PX)
        for found, expected in zip(size, (width, height), strict=True)
    )
    if is_changed and (is_uniform or min(factors) < 1):
        raise OptionError(
            f"{name!r} names a region of {width:.0f} x {height:.0f} pixels at d={downsample[0]:g}, "
            f"and the image has {size[0]} x {size[1]}. Was it resized, turned or cut? State "
            "`downsample`, the pixels of the slide for one of the image, or rename the file."
        )
