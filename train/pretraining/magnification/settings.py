"""Settings of a comparison of encoders across magnifications."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from train.checked import CheckedSettings, Count, Mpp
from train.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(CheckedSettings):
    """Which tiles the encoders are compared on."""

    scales: tuple[Mpp, ...] = (1.0, 0.5, 0.25)
    """um per pixel, the coarsest first: probes are trained at the first and tested at all."""
    tile_px: Count = 96
    """Side of a tile, at every scale ("same pixels"); at the coarsest scale also the field that
    finer tiles of the rule "same field" show."""
    patch_px: Count = 16
    """Side of the encoders' patches: every tile is a whole number of them wide."""
    purity: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Least share of a tile's labelled pixels that its class has."""
    tiles_per_slide: Count = 16
    """At most this many labelled tiles of each slide and scale."""
    same_field: bool = True
    """Probe the rule "same field", too: its finest tiles have many pixels and cost most of the
    time."""
    squares_per_slide: Count = 2
    """At most this many squares of each slide to segment."""

    def field_px(self, scale: float) -> int:
        """Side in pixels of a tile with the coarsest scale's field, in whole patches."""
        patches = self.tile_px * self.scales[0] / scale / self.patch_px
        return max(1, round(patches)) * self.patch_px

    def __post_init__(self) -> None:
        """Refuse a value out of its range, and scales that compare nothing.

        Raises:
            SettingsError: one of these.
        """
        super().__post_init__()
        if len(self.scales) < 2 or list(self.scales) != sorted(self.scales, reverse=True):
            raise SettingsError(
                f"scales are {self.scales}; expected at least two um per pixel, coarsest first. "
                "Change --scales."
            )
        if self.tile_px % self.patch_px:
            raise SettingsError(
                f"tile_px is {self.tile_px}; expected a multiple of the encoders' patches of "
                f"{self.patch_px} pixels. Change --tile-px or --patch-px."
            )
