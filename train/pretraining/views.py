"""Views: which squares of a slide a sample shows, at which scale, and how they are augmented.

Coarse views show the surroundings, fine views the cells of the same place (arXiv 2512.14796, from
its abstract; how views are paired is our choice). A sample depends on the seed, the epoch and its
number alone, however many workers draw it.

Letters: P side of a coarse and fine view in pixels, F fine views, L local views, G patches of a
coarse view along a side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from train.errors import SourceError
from train.pretraining.colors import NUM_COLORS, draw_colors
from train.pretraining.footprints import (
    NUM_DIHEDRAL_MOVES,
    Footprint,
    footprint_weights,
    move_dihedrally,
)
from train.pretraining.regions import RegionSource, SlideInfo
from train.pretraining.settings import ViewSettings

_MAX_DRAWS = 20
_MAX_PLACES = 200
_COARSE_TISSUE, _FINE_TISSUE = 0.4, 0.6
"""Least share of tissue, as in Midnight (coarse) and Virchow (fine)."""
_WINDOW = 1.33
_NUM_COARSE = 2
_SAME_SCALE = 0.98
"""A scale that is finer by less than this is taken from the coarser part of a slide."""


class ViewSample(TypedDict):
    """One sample's views, before colour is changed on the training device.

    coarse: (2, 3, P, P) uint8 RGB. fine: (F, 3, P, P) uint8. local: (L, 3, p, p) uint8.
    weights: (2, F, G, G) float32, each sums to 1: where a fine view lies in a coarse one.
    scale: () int64, index of the coarse views' scale.
    coarse_colors, fine_colors, local_colors: (N, 6) float32, see `draw_colors`.
    """

    coarse: Tensor
    fine: Tensor
    local: Tensor
    weights: Tensor
    scale: Tensor
    coarse_colors: Tensor
    fine_colors: Tensor
    local_colors: Tensor


@dataclass(frozen=True)
class Layout:
    """The squares of one sample."""

    slide: int
    coarse: tuple[Footprint, ...]
    fine: tuple[Footprint, ...]
    fine_slide: int
    """Where the fine views are from: another slide only in the shuffled control."""
    scale: int


class ViewDataset(Dataset[ViewSample]):
    """Samples of views, by (epoch, number).

    Args:
        source: what to read.
        slides: numbers of the slides to take samples from.
        settings: which views.
        patch_size: of the encoder, in pixels.
        num_samples: samples of an epoch.
        seed: of the run.
    """

    def __init__(
        self,
        source: RegionSource,
        slides: Sequence[int],
        settings: ViewSettings,
        *,
        patch_size: int,
        num_samples: int,
        seed: int,
    ) -> None:
        self.source, self.slides, self.settings = source, tuple(slides), settings
        self.patch_size, self.num_samples, self.seed = patch_size, num_samples, seed
        areas = np.array([source.slides[i].area_um2 for i in self.slides])
        self._shares = areas / areas.sum()

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, key: tuple[int, int]) -> ViewSample:
        """Draw sample `key[1]` of epoch `key[0]`."""
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, *key)))
        layout = self.draw_layout(rng)
        settings, size, read = self.settings, self.settings.view_px, self.source.read
        coarse, fine, weights = [], [], []
        moves = rng.integers(NUM_DIHEDRAL_MOVES, size=_NUM_COARSE)
        for footprint, move in zip(layout.coarse, moves, strict=True):
            coarse.append(move_dihedrally(read(layout.slide, footprint, size), int(move)))
            weights.append(self._weights(layout, footprint, int(move)))
        for footprint in layout.fine:
            move = int(rng.integers(NUM_DIHEDRAL_MOVES))
            fine.append(move_dihedrally(read(layout.fine_slide, footprint, size), move))
        drawn = [self._read_local(rng, layout) for _ in range(settings.num_local)]
        local = [picture for picture, _ in drawn]
        mpps = {
            "coarse": [f.side_um / size for f in layout.coarse],
            "fine": [f.side_um / size for f in layout.fine],
            "local": [mpp for _, mpp in drawn],
        }
        colors = {
            name: torch.from_numpy(np.stack([draw_colors(rng, mpp, settings) for mpp in given]))
            if given
            else torch.zeros(0, NUM_COLORS)
            for name, given in mpps.items()
        }
        return ViewSample(
            coarse=_stacked(coarse, size),
            fine=_stacked(fine, size),
            local=_stacked(local, settings.local_px),
            weights=torch.from_numpy(np.stack(weights)),
            scale=torch.tensor(layout.scale),
            coarse_colors=colors["coarse"],
            fine_colors=colors["fine"],
            local_colors=colors["local"],
        )

    def draw_layout(self, rng: np.random.Generator) -> Layout:
        """Choose the squares of a sample: on tissue, after at most 20 draws the best seen."""
        layout = self._on_tissue(rng, self.slides, self._shares)
        return layout if self.settings.pairing != "shuffled" else self._shuffled(rng, layout)

    def _on_tissue(
        self, rng: np.random.Generator, slides: Sequence[int], shares: NDArray[np.float64] | None
    ) -> Layout:
        best: tuple[float, Layout] | None = None
        for _ in range(_MAX_DRAWS):
            layout = self._lay_out(rng, int(rng.choice(slides, p=shares)))
            missing = self._missing_tissue(layout)
            if best is None or missing < best[0]:
                best = (missing, layout)
            if missing <= 0:
                break
        assert best is not None
        return best[1]

    def _lay_out(self, rng: np.random.Generator, slide: int) -> Layout:
        settings, info = self.settings, self.source.slides[slide]
        scale, coarse_mpp = settings.draw_scale(rng)
        jitter = np.exp(rng.uniform(-settings.scale_jitter, settings.scale_jitter, _NUM_COARSE))
        bounds, near, finest = _where(info, coarse_mpp)
        coarse_sides = settings.view_px * np.maximum(coarse_mpp * jitter, finest)
        coarse_sides = np.minimum(coarse_sides, min(bounds[2:]))
        fine_sides = self._draw_fine_sides(rng, info)
        needed = max(fine_sides, default=0.0)
        for _ in range(_MAX_PLACES):
            coarse = _place_coarse(rng, bounds, near, coarse_sides)
            shared = _intersection((*coarse, *_fine_area(info)))
            if shared is not None and min(shared[2:]) >= needed:
                break
        else:
            raise SourceError(
                f"{info.name} has no place for a fine view of {needed:.0f} um inside coarse ones "
                f"of {coarse_sides.min():.0f} um. Take smaller views (--view-px) or finer scales "
                "(--fine-mpps)."
            )
        fine = tuple(
            Footprint(
                shared[0] + rng.uniform(0, shared[2] - side),
                shared[1] + rng.uniform(0, shared[3] - side),
                side,
            )
            for side in fine_sides
        )
        return Layout(slide, coarse, fine, slide, scale)

    def _draw_fine_sides(self, rng: np.random.Generator, info: SlideInfo) -> list[float]:
        settings, sides = self.settings, []
        for mpp in settings.fine_mpps[: settings.num_fine]:
            drawn = mpp * np.exp(rng.uniform(-settings.scale_jitter, settings.scale_jitter))
            sides.append(settings.view_px * max(float(drawn), info.base_mpp))
        return sides

    def _shuffled(self, rng: np.random.Generator, layout: Layout) -> Layout:
        """The control: fine views from another slide, laid out as they would be there."""
        others = [slide for slide in self.slides if slide != layout.slide]
        other = self._on_tissue(rng, others or [layout.slide], None)
        return Layout(layout.slide, layout.coarse, other.fine, other.slide, layout.scale)

    def _missing_tissue(self, layout: Layout) -> float:
        found = self.source.tissue_share
        coarse = [_COARSE_TISSUE - found(layout.slide, square) for square in layout.coarse]
        fine = [_FINE_TISSUE - found(layout.slide, square) for square in layout.fine]
        return max((*coarse, *fine))

    def _weights(self, layout: Layout, coarse: Footprint, move: int) -> NDArray[np.float32]:
        num_cells = self.settings.view_px // self.patch_size
        if layout.fine_slide != layout.slide:
            uniform = np.full((num_cells, num_cells), 1 / num_cells**2, np.float32)
            return np.stack([uniform] * len(layout.fine))
        weights = [footprint_weights(coarse, fine, num_cells, move) for fine in layout.fine]
        empty = np.zeros((0, num_cells, num_cells), np.float32)
        return np.stack(weights) if weights else empty

    def _read_local(
        self, rng: np.random.Generator, layout: Layout
    ) -> tuple[NDArray[np.uint8], float]:
        """A small square out of one of the coarse ones, and its um per pixel."""
        settings = self.settings
        coarse = layout.coarse[int(rng.integers(_NUM_COARSE))]
        low, high = settings.local_share
        side = coarse.side_um * float(rng.uniform(low, high))
        info = self.source.slides[layout.slide]
        side = max(side, settings.local_px * info.mpp_of(coarse) / 1.1)
        side = min(side, coarse.side_um)
        free = coarse.side_um - side
        square = Footprint(
            coarse.y_um + rng.uniform(0, free), coarse.x_um + rng.uniform(0, free), side
        )
        picture = self.source.read(layout.slide, square, settings.local_px)
        moved = move_dihedrally(picture, int(rng.integers(NUM_DIHEDRAL_MOVES)))
        return moved, side / settings.local_px


def _stacked(pictures: list[NDArray[np.uint8]], size_px: int) -> Tensor:
    if not pictures:
        return torch.zeros(0, 3, size_px, size_px, dtype=torch.uint8)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def _fine_area(info: SlideInfo) -> tuple[Footprint, ...]:
    return () if info.fine_area is None else (info.fine_area,)


Rectangle = tuple[float, float, float, float]
"""Top, left, height and width in um."""


def _where(info: SlideInfo, mpp: float) -> tuple[Rectangle, Rectangle, float]:
    """Where large views may lie, what they shall be near, and the finest um per pixel there.

    A slide that is fine in a part alone shows fine scales only in that part; coarse views may lie
    anywhere, but near it, so that fine views have a place in them.
    """
    whole = (0.0, 0.0, info.height_um, info.width_um)
    area = info.fine_area
    if area is None:
        return whole, whole, info.base_mpp
    part = (area.y_um, area.x_um, area.side_um, area.side_um)
    outer = info.outer_mpp or info.base_mpp
    return (whole, part, outer) if mpp >= outer * _SAME_SCALE else (part, part, info.base_mpp)


def _place_coarse(
    rng: np.random.Generator, bounds: Rectangle, near: Rectangle, sides: NDArray[np.float64]
) -> tuple[Footprint, ...]:
    """Squares anywhere in one window that is 1.33 times as large as the largest of them.

    The window lies in `bounds` and covers a point of `near`.
    """
    window = min(_WINDOW * float(sides.max()), *bounds[2:])
    point = (near[0] + rng.uniform(0, near[2]), near[1] + rng.uniform(0, near[3]))
    corner = [
        float(np.clip(at - rng.uniform(0, window), start, start + length - window))
        for at, start, length in zip(point, bounds[:2], bounds[2:], strict=True)
    ]
    squares = []
    for side in sides:
        free = max(0.0, window - float(side))
        squares.append(
            Footprint(corner[0] + rng.uniform(0, free), corner[1] + rng.uniform(0, free), side)
        )
    return tuple(squares)


def _intersection(squares: Sequence[Footprint]) -> Rectangle | None:
    """What all squares share, or None."""
    top = max(square.y_um for square in squares)
    left = max(square.x_um for square in squares)
    height = min(square.y_um + square.side_um for square in squares) - top
    width = min(square.x_um + square.side_um for square in squares) - left
    return (top, left, height, width) if min(height, width) > 0 else None
