"""What encoders are compared on."""

from dataclasses import dataclass

from train.errors import FocalPathError


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Which tiles the encoders are compared on."""

    scales: tuple[float, ...] = (1.0, 0.5, 0.25)
    """um per pixel, the coarsest first: probes are trained at the first and tested at all."""
    tile_px: int = 96
    """Side of a tile, at every scale ("same pixels"); at the coarsest scale also the field that
    finer tiles of the rule "same field" show."""
    purity: float = 0.5
    """Least share of a tile's labelled pixels that its class has."""
    tiles_per_slide: int = 16
    """At most this many labelled tiles of each slide and scale."""
    squares_per_slide: int = 2
    """At most this many squares of each slide to segment."""

    def __post_init__(self) -> None:
        """Refuse what compares nothing."""
        if len(self.scales) < 2 or list(self.scales) != sorted(self.scales, reverse=True):
            raise FocalPathError(
                f"scales are {self.scales}; expected at least two um per pixel, coarsest first"
            )
        if not 0 < self.purity <= 1:
            raise FocalPathError(f"purity is {self.purity}; expected above 0, at most 1")
        for name in ("tile_px", "tiles_per_slide", "squares_per_slide"):
            if getattr(self, name) < 1:
                raise FocalPathError(f"{name} is {getattr(self, name)}; expected 1 or more")
