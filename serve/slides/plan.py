"""The plan of one slide: all that its result depends on, and which tiles belong to which block.

Frames: *level 0* is the slide's own; the *view* is its scanned part at the model's um per pixel; a
*cell* is LOW_RES_STRIDE x LOW_RES_STRIDE pixels of the view, the decoder's resolution, at which
results are stored. A *block* is a square of cells: one shard of the result, computed by one task
that runs every tile that reaches into it. A cell gets the same tiles in the same order whatever the
block size, so that the result depends neither on it nor on who computed what when.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from serve.contract.manifest import LOW_RES_STRIDE, Manifest, TissueClass
from serve.contract.strict import Strict
from serve.images.readers.reader import MppSource, RegionReader
from serve.images.readers.scaled import ScaledView
from serve.images.tiles import SAME_MPP, tile_origins
from serve.slides.errors import CohortError
from serve.slides.options import Settings
from serve.slides.tissue import TISSUE_MPP, Mask, mask_shape

SCHEMA_VERSION: Final = 1


class SlideInfo(Strict):
    """The slide, as it was opened."""

    path: str
    fingerprint: str
    """See `RegionReader.fingerprint`."""
    reader: str
    reader_version: str
    width_px: int
    height_px: int
    mpp: float
    mpp_source: MppSource
    bounds: tuple[int, int, int, int]
    """x, y, width and height of the scanned part, in pixels of level 0."""


class ModelInfo(Strict):
    """The model, as the bundle's manifest and the settings say."""

    name: str
    version: str
    checkpoint_sha256: str
    artefact_sha256: str
    precision: str
    runs_on: str
    """Backend and provider."""
    mpp: float
    tile_size_px: int
    classes: tuple[TissueClass, ...]


@dataclass(frozen=True)
class Block:
    """One task: a shard of the result."""

    row: int
    column: int

    @property
    def name(self) -> str:
        """Of its marker."""
        return f"{self.row}_{self.column}"


@dataclass(frozen=True)
class Rectangle:
    """Rows and columns of cells, the ends not included."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.bottom - self.top, self.right - self.left

    @property
    def slices(self) -> tuple[slice, slice]:
        """Of an array of all cells."""
        return slice(self.top, self.bottom), slice(self.left, self.right)


@dataclass(frozen=True)
class TileRow:
    """The tiles of a block that start in the same row."""

    y: int
    """In pixels of the view."""
    x: tuple[int, ...]


class Plan(Strict):
    """All that a slide's labels depend on; written before the first block is computed."""

    schema_version: Literal[1] = SCHEMA_VERSION
    slide: SlideInfo
    model: ModelInfo
    settings: Settings
    height_px: int
    """Rows of the view."""
    width_px: int
    origin_px: tuple[float, float]
    """(y, x) of the view's corner, in pixels of level 0."""
    step_px: tuple[float, float]
    """(y, x) pixels of level 0 from one pixel of the view to the next."""
    level: int
    """Level of the slide that is read."""
    is_resampled: bool
    mask_px: int
    """Side in pixels of the view of one pixel of the tissue mask; a multiple of LOW_RES_STRIDE."""
    mask_sha256: str

    @property
    def key(self) -> str:
        """Digest of what the result depends on: not the slide's path or the library's version."""
        where = {"slide": {"path", "reader_version"}}
        return hashlib.sha256(self.model_dump_json(exclude=where).encode()).hexdigest()

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of cells that the slide covers."""
        return -(-self.height_px // LOW_RES_STRIDE), -(-self.width_px // LOW_RES_STRIDE)

    @property
    def um_per_cell(self) -> float:
        """Side of a cell."""
        step = (self.step_px[0] + self.step_px[1]) / 2
        return self.slide.mpp * step * LOW_RES_STRIDE

    @property
    def level0_px_per_cell(self) -> tuple[float, float]:
        """(y, x) pixels of level 0 along a cell."""
        return self.step_px[0] * LOW_RES_STRIDE, self.step_px[1] * LOW_RES_STRIDE

    def rectangle(self, block: Block) -> Rectangle:
        """The cells of a block."""
        side, (rows, columns) = self.settings.block_cells, self.shape
        top, left = block.row * side, block.column * side
        return Rectangle(top, left, min(top + side, rows), min(left + side, columns))


class Tiling:
    """Which blocks a plan has, and which tiles run for each.

    Args:
        plan: of the slide.
        mask: its tissue, (h, w) bool, one for `plan.mask_px` pixels of the view.
    """

    def __init__(self, plan: Plan, mask: Mask) -> None:
        assert mask.shape == mask_shape(plan.height_px, plan.width_px, plan.mask_px)
        self.plan = plan
        self.mask = mask
        tile = plan.model.tile_size_px
        heights = max(plan.shape[0] * LOW_RES_STRIDE, tile)
        widths = max(plan.shape[1] * LOW_RES_STRIDE, tile)
        self._rows = tile_origins(heights, tile, plan.settings.overlap)
        self._columns = tile_origins(widths, tile, plan.settings.overlap)
        self._sums = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
        np.cumsum(np.cumsum(mask, axis=0), axis=1, out=self._sums[1:, 1:])

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks with tissue, row by row."""
        side = self.plan.settings.block_cells
        rows, columns = (-(-length // side) for length in self.plan.shape)
        blocks = (Block(row, column) for row in range(rows) for column in range(columns))
        return tuple(block for block in blocks if self._has_tissue(self.plan.rectangle(block)))

    def tile_rows(self, block: Block) -> list[TileRow]:
        """The tiles that cover tissue of a block, row by row.

        Every tile that covers a cell with tissue is among them: what is left out would only have
        answered for cells that are cleared.
        """
        rectangle = self.plan.rectangle(block)
        tile_cells = self.plan.model.tile_size_px // LOW_RES_STRIDE
        found = []
        for y in self._rows:
            top, bottom = _overlap(y, tile_cells, rectangle.top, rectangle.bottom)
            if top >= bottom:
                continue
            columns = []
            for x in self._columns:
                left, right = _overlap(x, tile_cells, rectangle.left, rectangle.right)
                if left < right and self._has_tissue(Rectangle(top, left, bottom, right)):
                    columns.append(x)
            if columns:
                found.append(TileRow(y, tuple(columns)))
        return found

    def num_tiles(self, block: Block) -> int:
        """How many tiles run for a block."""
        return sum(len(row.x) for row in self.tile_rows(block))

    def num_unique_tiles(self) -> int:
        """How many tiles have tissue under them; without those that two blocks run."""
        tile_cells = self.plan.model.tile_size_px // LOW_RES_STRIDE
        rows, columns = self.plan.shape
        return sum(
            self._has_tissue(Rectangle(top, left, bottom, right))
            for top, bottom in (_overlap(y, tile_cells, 0, rows) for y in self._rows)
            for left, right in (_overlap(x, tile_cells, 0, columns) for x in self._columns)
        )

    def cell_mask(self, rectangle: Rectangle) -> Mask:
        """Which cells of a rectangle are tissue, (rows, columns) bool."""
        side = self.plan.mask_px // LOW_RES_STRIDE
        part = self.mask[
            rectangle.top // side : -(-rectangle.bottom // side),
            rectangle.left // side : -(-rectangle.right // side),
        ]
        cells: NDArray[np.bool_] = part.repeat(side, axis=0).repeat(side, axis=1)
        rows, columns = rectangle.shape
        top, left = rectangle.top % side, rectangle.left % side
        return cells[top : top + rows, left : left + columns]

    def _has_tissue(self, cells: Rectangle) -> bool:
        side = self.plan.mask_px // LOW_RES_STRIDE
        top, left = cells.top // side, cells.left // side
        bottom, right = -(-cells.bottom // side), -(-cells.right // side)
        sums = self._sums
        total = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        return bool(total > 0)

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)


def _overlap(origin_px: int, tile_cells: int, start: int, end: int) -> tuple[int, int]:
    """The cells of a tile along an axis that lie in [start, end)."""
    first = origin_px // LOW_RES_STRIDE
    return max(first, start), min(first + tile_cells, end)


def make_plan(
    reader: RegionReader,
    view: ScaledView,
    model: ModelInfo,
    settings: Settings,
    mask: Mask,
    mask_px: int,
) -> Plan:
    """The plan of an open slide."""
    bounds = reader.bounds
    slide = SlideInfo(
        path=str(reader.path),
        fingerprint=reader.fingerprint(),
        reader=reader.name,
        reader_version=reader.version,
        width_px=reader.width_px,
        height_px=reader.height_px,
        mpp=reader.require_mpp(),
        mpp_source=reader.mpp_source,
        bounds=(bounds.x, bounds.y, bounds.width, bounds.height),
    )
    return Plan(
        slide=slide,
        model=model,
        settings=settings,
        height_px=view.height_px,
        width_px=view.width_px,
        origin_px=view.origin_px,
        step_px=view.step_px,
        level=view.level,
        is_resampled=view.is_resampled,
        mask_px=mask_px,
        mask_sha256=hashlib.sha256(np.packbits(mask).tobytes()).hexdigest(),
    )


def open_view(reader: RegionReader, model: ModelInfo) -> ScaledView:
    """The slide at the model's um per pixel; a level within 2% of it is taken as it is."""
    return reader.at_mpp(model.mpp, tolerance=SAME_MPP)


def mask_size(mpp: float) -> int:
    """Side in pixels of the view of one pixel of the tissue mask: about 8 um, whole cells."""
    return max(round(TISSUE_MPP / mpp / LOW_RES_STRIDE), 1) * LOW_RES_STRIDE


def describe_model(manifest: Manifest, precision: str, runs_on: str) -> ModelInfo:
    """The model of a bundle, as plans name it.

    Raises:
        CohortError: the bundle does not say at which um per pixel its model works.
    """
    if manifest.mpp is None:
        raise CohortError(
            f"the bundle of {manifest.name} {manifest.version} does not state its um per pixel, so "
            "slides cannot be scaled to it. Train and export with `mpp` set."
        )
    sha256 = {artefact.precision: artefact.sha256 for artefact in manifest.artefacts}
    return ModelInfo(
        name=manifest.name,
        version=manifest.version,
        checkpoint_sha256=manifest.checkpoint_sha256,
        artefact_sha256=sha256.get(precision, manifest.artefacts[0].sha256),  # type: ignore[call-overload]
        precision=precision,
        runs_on=runs_on,
        mpp=manifest.mpp,
        tile_size_px=manifest.tile_size_px,
        classes=manifest.classes,
    )


def differences(found: Plan, expected: Plan) -> list[str]:
    """What differs between two plans, as `name: found, expected`; empty where the keys agree."""
    if found.key == expected.key:
        return []
    pairs = []
    for part in ("slide", "model", "settings"):
        one, other = getattr(found, part), getattr(expected, part)
        for name in type(one).model_fields:
            if name not in ("path", "reader_version"):
                pairs.append((f"{part}.{name}", getattr(one, name), getattr(other, name)))
    pairs.append(("tissue mask", found.mask_sha256[:12], expected.mask_sha256[:12]))
    listed = [f"{name} was {_short(a)}, is {_short(b)}" for name, a, b in pairs if a != b]
    return listed or ["the geometry of the slide"]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def read_plan(path: Path) -> Plan:
    """Read a plan that was written as JSON."""
    return Plan.model_validate_json(path.read_bytes())
