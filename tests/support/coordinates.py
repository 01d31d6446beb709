"""A slide whose colours are its coordinates, fine enough to prove half a pixel.

Red rises and falls with the row, green with the column, by four steps a pixel: a plain gradient
over a whole slide would have fewer steps than pixels.
"""

import numpy as np
from numpy.typing import NDArray

RAMP_PX = 64
"""Pixels over which a colour goes from 0 to 255, and then back."""


def coordinate_colors(height: int, width: int) -> NDArray[np.uint8]:
    """Draw the slide, (height, width, 3) uint8."""
    rows, columns = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    pixels = np.stack([_ramp(rows), _ramp(columns), np.full_like(rows, 128)], axis=-1)
    return np.asarray(np.rint(pixels), np.uint8)


def largest_error_px(
    view: NDArray[np.uint8], corner_px: tuple[float, float], step: float | tuple[float, float]
) -> float:
    """How far a view's pixels lie from where they should, at most, in pixels of the slide.

    Args:
        view: (S, S, 3) uint8, cut from the slide.
        corner_px: (y, x) of its upper left corner, in pixels of the slide.
        step: pixels of the slide for one of the view, along both axes or as (y, x).
    """
    size, errors = len(view), []
    steps = step if isinstance(step, tuple) else (step, step)
    for channel, (start, step) in enumerate(zip(corner_px, steps, strict=True)):
        at = start + (np.arange(size) + 0.5) * step
        found = view[..., channel].astype(float).mean(axis=1 - channel)
        from_peak = np.abs(at / RAMP_PX % 1 - 0.5) * RAMP_PX  # filters round the peaks off
        is_straight = from_peak < RAMP_PX / 2 - 3 * max(step, 1.0)
        assert is_straight.sum() > 10
        errors.append((np.abs(found - _ramp(at)) * RAMP_PX / 255)[is_straight].max())
    return float(max(errors))


def _ramp(at_px: NDArray[np.float64]) -> NDArray[np.float64]:
    """Triangles of height 255 over places in pixels."""
    return np.asarray(255 * (1 - np.abs(at_px / RAMP_PX % 2 - 1)))
