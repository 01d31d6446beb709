"""The plan of one slide: all that its result depends on, and which tiles belong to which block.

Frames: *level 0* is the slide's own; the *view* is its scanned part at the model's um per pixel; a
*cell* is LOW_RES_STRIDE x LOW_RES_STRIDE pixels of the view, the decoder's resolution, at which
results are stored. A *block* is a square of cells: one shard of the result, computed by one task
that runs every tile that reaches into it. A cell gets the same tiles in the same order whatever the
block size, so that the result depends neither on it nor on who computed what when.
"""

import hashlib
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from serve.contract.certificate import ScaleCertificate
from serve.contract.manifest import LOW_RES_STRIDE, TissueClass
from serve.contract.strict import Strict
from serve.images.mpp import MppSource, PixelSize
from serve.images.readers.reader import RegionReader
from serve.images.readers.scaled import ScaledView
from serve.images.tiles import SAME_MPP, check_enlargement
from serve.slides.options import Settings
from serve.slides.tissue import Mask, mask_size

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
    """um per pixel of level 0; where pixels are not squares, the side of the square with the same
    area."""
    mpp_source: MppSource
    bounds: tuple[int, int, int, int]
    """x, y, width and height of the scanned part, in pixels of level 0."""
    mpp_xy: PixelSize | None = None
    """um per pixel along each axis, where pixels are not squares."""

    @property
    def pixel_size(self) -> PixelSize:
        """Um per pixel of level 0 along each axis."""
        return self.mpp_xy or PixelSize(self.mpp, self.mpp)


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
    scale_certificate: ScaleCertificate | None = None

    def scale_warning(self, size: PixelSize) -> str | None:
        """What to tell of a slide of that um per pixel, by what the export measured."""
        if self.scale_certificate is None:
            return None
        names = [entry.name for entry in self.classes]
        return self.scale_certificate.warning(max(size), self.mpp, names)


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
        size = self.slide.pixel_size
        return (self.step_px[0] * size.y + self.step_px[1] * size.x) / 2 * LOW_RES_STRIDE

    @property
    def level0_px_per_cell(self) -> tuple[float, float]:
        """(y, x) pixels of level 0 along a cell."""
        return self.step_px[0] * LOW_RES_STRIDE, self.step_px[1] * LOW_RES_STRIDE

    def all_blocks(self) -> list[Block]:
        """The blocks that the result is divided into, with tissue or without, row by row."""
        rows, columns = (-(-length // self.settings.block_cells) for length in self.shape)
        return [Block(row, column) for row in range(rows) for column in range(columns)]

    def rectangle(self, block: Block) -> Rectangle:
        """The cells of a block."""
        side, (rows, columns) = self.settings.block_cells, self.shape
        top, left = block.row * side, block.column * side
        return Rectangle(top, left, min(top + side, rows), min(left + side, columns))


def make_plan(reader: RegionReader, model: ModelInfo, settings: Settings, mask: Mask) -> Plan:
    """The plan of an open slide whose tissue is known."""
    view = open_view(reader, model)
    bounds, size = reader.bounds, reader.require_pixel_size()
    slide = SlideInfo(
        path=str(reader.path),
        fingerprint=reader.fingerprint(),
        reader=reader.name,
        reader_version=reader.version,
        width_px=reader.width_px,
        height_px=reader.height_px,
        mpp=size.mean,
        mpp_xy=None if size.x == size.y else size,
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
        mask_px=mask_size(model.mpp),
        mask_sha256=hashlib.sha256(np.packbits(mask).tobytes()).hexdigest(),
    )


def open_view(reader: RegionReader, model: ModelInfo) -> ScaledView:
    """The slide at the model's um per pixel; a level within 2% of it is taken as it is.

    Raises:
        SlideScaleError: its own um per pixel is not known.
        ImageTooLargeError: it would be enlarged too far.
    """
    check_enlargement(model.mpp, reader.pixel_size, "the slide")
    return reader.at_mpp(model.mpp, tolerance=SAME_MPP)


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
