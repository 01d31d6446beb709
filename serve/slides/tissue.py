"""Where a slide has tissue: found by its colour, or given as a mask or as regions.

The rule is CLAM's default (Lu et al., 2021, arXiv:2004.09666): glass has no colour, tissue has.
A pixel of 8 um is tissue where the median saturation around it is above a fixed value. Thresholds
that adapt to the slide (Otsu) lose pale stroma and fat, and find tissue on empty glass. What a miss
costs is the answer there, what a false hit costs is time: so the tissue is grown at the end.
Marks of a green pen and what is nearly black, such as borders, are left out (our choice).
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw
from shapely.errors import ShapelyError
from shapely.geometry import shape

from serve.contract.errors import ImageTooLargeError
from serve.contract.json_text import parse_json
from serve.contract.manifest import LOW_RES_STRIDE
from serve.images.kinds import HEAD_BYTES, kind_of
from serve.images.readers.geojson import begins_at_bounds, is_focalpath, stated_origin
from serve.images.readers.scaled import ScaledView
from serve.images.refusals import DECODER_ERRORS
from serve.settings import MEGAPIXEL, PILLOW_LIMIT_MEGAPIXELS
from serve.slides.errors import MaskError
from serve.slides.options import TissueRule

TISSUE_MPP = 8.0
"""um per pixel at which tissue is looked for."""

MAX_MASK_PIXELS = PILLOW_LIMIT_MEGAPIXELS * MEGAPIXEL
"""About 11,000 mm2, five times a usual glass."""

_GZIP, _PNG = b"\x1f\x8b", b"\x89PNG"
_UNPACKING = (OSError, EOFError, zlib.error)
_VALUES = ("1", "L", "P", "I;16", "I")
"""Pillow's modes of one channel of whole numbers."""

Mask = NDArray[np.bool_]


def find_tissue(view: ScaledView, rule: TissueRule) -> Mask:
    """Find the tissue of a view: (h, w) bool, as large as `mask_shape` says.

    Raises:
        ImageTooLargeError: it is larger than any glass.
    """
    mask_shape(view)  # before the memory is taken
    mask_px = mask_size(view.mpp)
    return tissue_of(view.overview(mask_px), rule, um_per_pixel=view.mpp * mask_px)


def tissue_of(
    overview: NDArray[np.uint8], rule: TissueRule, *, um_per_pixel: float = TISSUE_MPP
) -> Mask:
    """Find the tissue of an (h, w, 3) uint8 RGB overview; (h, w) bool."""
    hue, saturation, value = np.moveaxis(
        np.asarray(Image.fromarray(overview).convert("HSV")), -1, 0
    )
    colored = saturation > rule.saturation
    if rule.exclude_pen:
        low, high = rule.green_hue
        green = (hue >= low) & (hue <= high) & (saturation >= rule.green_saturation)
        colored &= ~green & (value >= rule.black_value)
    # The median is above a value where more than half of its window is.
    radius = rule.median_px // 2
    majority = _box_sum(colored, radius) * 2 > _box_sum(np.ones_like(colored), radius)
    closed = ~_grow(~_grow(majority, rule.close_px // 2), rule.close_px // 2)
    return _grow(closed | majority, round(rule.grow_um / um_per_pixel))


def mask_size(mpp: float) -> int:
    """Side in pixels of a view of one pixel of its tissue mask: about 8 um, whole cells."""
    return max(round(TISSUE_MPP / mpp / LOW_RES_STRIDE), 1) * LOW_RES_STRIDE


def mask_shape(view: ScaledView) -> tuple[int, int]:
    """Rows and columns of the mask of a view.

    Raises:
        ImageTooLargeError: it is larger than any glass.
    """
    side = mask_size(view.mpp)
    height, width = -(-view.height_px // side), -(-view.width_px // side)
    if height * width > MAX_MASK_PIXELS:
        mm = view.mpp / 1000
        raise ImageTooLargeError(
            f"The slide is {view.width_px * mm:.4g} x {view.height_px * mm:.4g} mm large, expected "
            f"at most {MAX_MASK_PIXELS * (side * mm) ** 2:.0f} mm2: its um per pixel is wrong, or "
            "the file is damaged.",
            code="slide_too_large",
        )
    return height, width


def read_mask(path: Path, view: ScaledView) -> Mask:
    """Read a mask or regions for a view.

    Args:
        path: PNG as large as the scanned part of the slide, at any um per pixel, tissue where it is
            not 0; or GeoJSON, also compressed by gzip, with polygons in pixels of level 0. QuPath's
            count from the scanned part, and FocalPath's from where they say. The content decides,
            not the name.
        view: the slide at the model's um per pixel.

    Raises:
        MaskError: the file is missing, of another kind, or of another shape than the slide.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MaskError(f"the mask {path} cannot be read: {error.strerror}.") from error
    if content.startswith(_GZIP):
        try:
            content = gzip.decompress(content)
        except _UNPACKING as error:
            raise MaskError(f"{path} cannot be unpacked: {error}. Copy it again.") from error
    if not content.startswith(_PNG):
        polygons = _polygons(path, content, view)
        mask = _rasterise(polygons, view)
        if not mask.any():
            raise _outside(path, polygons, view)
        return mask
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            # The values count, not the colours that a palette gives them.
            values = np.asarray(image if image.mode in _VALUES else image.convert("RGB"))
            given: Mask = np.any(values.reshape(*values.shape[:2], -1), axis=2)
            if image.has_transparency_data and image.mode not in ("I;16", "I"):
                given &= np.asarray(image.convert("RGBA").getchannel("A")) > 0
    except Image.DecompressionBombError as error:
        raise MaskError(
            f"the mask {path} has more than {PILLOW_LIMIT_MEGAPIXELS} megapixels. Make it smaller: "
            f"one pixel for {TISSUE_MPP:g} um is enough."
        ) from error
    except DECODER_ERRORS as error:
        raise MaskError(
            f"the mask {path} is a damaged PNG: {error}. Give another, or GeoJSON with polygons."
        ) from error
    return _fit(given, view, path)


def _rasterise(polygons: list[Any], view: ScaledView) -> Mask:
    """The mask of shapely polygons in pixels of level 0: all that a region reaches into.

    Holes are left out, as far as pixels lie in them as a whole.
    """
    height, width = mask_shape(view)
    canvas = Image.new("1", (width, height))
    origin = np.array(view.origin_px[::-1])
    step = np.array(view.step_px[::-1]) * mask_size(view.mpp)
    for polygon in polygons:
        ends = (np.reshape(polygon.bounds, (2, 2)) - origin) / step
        left, top = np.clip(ends[0] - 1, 0, (width, height)).astype(int).tolist()
        right, bottom = np.clip(ends[1] + 2, 0, (width, height)).astype(int).tolist()
        if left == right or top == bottom:
            continue
        rings = [
            (np.asarray(ring.coords)[:, :2] - origin) / step - (left, top)
            for ring in (polygon.exterior, *polygon.interiors)
        ]
        size = right - left, bottom - top  # there may be thousands of polygons
        drawn = Image.new("1", size, 1)
        # A line between two pixels is of neither: it has to be within at either of them.
        for on_line in product((0, 1), repeat=2):
            drawn = ImageChops.logical_and(drawn, _draw(rings, size, on_line))
        canvas.paste(1, (left, top), drawn)
    return np.asarray(canvas, bool)


def _draw(
    rings: Iterable[NDArray[np.float64]], size: tuple[int, int], on_line: tuple[int, ...]
) -> Image.Image:
    """Fill the first of some rings with its edge, and clear the others within.

    `on_line` says of x and y whether what lies between two pixels is in the one before.
    """
    drawn = Image.new("1", size)
    draw = ImageDraw.Draw(drawn)
    for index, ring in enumerate(rings):
        pixels = np.where(on_line, np.ceil(ring) - 1, np.floor(ring))
        places = [(float(x), float(y)) for x, y in pixels]
        if len(places) >= 3:  # a hole may be empty
            draw.polygon(places, fill=int(index == 0), outline=1)
            draw.point(places, fill=1)  # where all are in one pixel
    return drawn


def _polygons(path: Path, content: bytes, view: ScaledView) -> list[Any]:
    """The polygons of a GeoJSON document: a collection of features, a list of them, or one.

    In pixels of level 0.
    """
    try:
        document = parse_json(content)
        features = document if isinstance(document, list) else document.get("features", [document])
        geometries = [feature.get("geometry", feature) for feature in features]
        with np.errstate(invalid="ignore"):  # NaN is refused below
            found = [shape(geometry) for geometry in geometries if geometry is not None]
        origin = _origin(document, view)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        kind = kind_of(content[:HEAD_BYTES]) or "neither a PNG nor JSON"
        raise MaskError(
            f"{path} is {kind} ({error}), expected a PNG or GeoJSON. Export the regions again."
        ) from error
    except (
        AttributeError,
        LookupError,
        OverflowError,
        TypeError,
        ValueError,
        ShapelyError,
    ) as error:
        raise MaskError(
            f"{path} is not GeoJSON: expected features with a geometry each, of which the areas "
            "are polygons. Export the regions again."
        ) from error
    polygons = [
        part
        for geometry in found
        for part in _parts(geometry)
        if part.geom_type == "Polygon" and not part.is_empty
    ]
    if not polygons:
        raise MaskError(
            f"{path} has no polygon. Draw the regions as areas, not as lines or points."
        )
    if not np.isfinite(shapely.get_coordinates(polygons)).all():
        raise MaskError(f"{path} has coordinates that are not numbers. Export the regions again.")
    moved: list[Any] = shapely.transform(polygons, lambda places: places + origin).tolist()
    return moved


def _parts(geometry: Any) -> Iterator[Any]:
    """The geometries of a collection, and of those in it; or the one that is given."""
    for part in getattr(geometry, "geoms", ()):
        yield from _parts(part)
    if not hasattr(geometry, "geoms"):
        yield geometry


def _origin(document: Any, view: ScaledView) -> tuple[float, float]:
    """X and y of level 0 at which a document's coordinates are 0."""
    if is_focalpath(document):
        return stated_origin(document)
    return (view.bounds.x, view.bounds.y) if begins_at_bounds(document) else (0, 0)


def _outside(path: Path, polygons: list[Any], view: ScaledView) -> MaskError:
    left, top, right, bottom = shapely.total_bounds(polygons)
    (y, x), (step_y, step_x) = view.origin_px, view.step_px
    return MaskError(
        f"the regions of {path} lie at x {left:.0f} to {right:.0f}, y {top:.0f} to {bottom:.0f}, "
        f"outside of the slide, which goes from x {x:.0f} to {x + view.width_px * step_x:.0f}, y "
        f"{y:.0f} to {y + view.height_px * step_y:.0f}. Are they of another slide?"
    )


def _fit(given: Mask, view: ScaledView, path: Path) -> Mask:
    """A mask at any scale as one of the view; a pixel is tissue where any of what it covers is."""
    scale = given.shape[0] / view.height_px
    expected = view.width_px * scale
    if abs(given.shape[1] - expected) > max(0.01 * expected, 1.5):
        raise MaskError(
            f"the mask {path} is {given.shape[1]} x {given.shape[0]} px, which is another shape "
            f"than the slide's {view.width_px} x {view.height_px}. Make it from the whole slide."
        )
    height, width = mask_shape(view)
    is_finer = given.shape[0] > height
    filter_ = Image.Resampling.BOX if is_finer else Image.Resampling.NEAREST
    image = Image.fromarray(given.astype(np.float32))  # a mean of few of many is not 0
    return np.asarray(image.resize((width, height), filter_)) > 0


def _box_sum(mask: Mask, radius: int) -> NDArray[np.int32]:
    """How many of the (2 radius + 1) squared pixels around each are set."""
    side = 2 * radius + 1
    padded = np.pad(mask, [(radius + 1, radius)] * 2)
    sums = padded.cumsum(axis=0, dtype=np.int32).cumsum(axis=1, dtype=np.int32)
    total: NDArray[np.int32] = sums[side:, side:] - sums[:-side, side:]
    total += sums[:-side, :-side] - sums[side:, :-side]
    return total


def _grow(mask: Mask, radius: int) -> Mask:
    return _box_sum(mask, radius) > 0 if radius else mask
