"""The um per pixel that a file states, where it says so, and whether that is believable.

The um per pixel that counts is the caller's, else the file's, else the model's as an assumption.
A file's is believed in two grades (our choice):

- What a microscope's program writes as a length per pixel (OME-XML, Aperio's MPP, ImageJ's unit)
  from MIN_MPP to MAX_MPP.
- A bare resolution in pixels per inch, centimetre or metre (TIFF tags, PNG's pHYs, JPEG's density)
  only up to MAX_DENSITY_MPP, and not where it is one that screens, printers and flat-bed scanners
  have: every program writes those, whatever the image shows.

What is not believed is told in a note. Pixels need not be squares: an image is resampled along each
axis by that axis's um per pixel. Sides that differ more than MAX_ASPECT times are refused.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from serve.contract.errors import ImageError, OptionError
from serve.images.descriptions import (
    OmeImage,
    aperio_sides,
    image_of_size,
    read_imagej,
    read_ome,
)
from serve.images.units import UM_PER_INCH, number, um_per_unit

CONTRADICTED = "was given, and counts"
"""Ends the note of a file whose um per pixel does not count."""
_CONTRADICTION = 0.05
"""Share by which the caller's um per pixel and the file's may differ without a note."""
MIN_MPP, MAX_MPP = 0.05, 20.0
"""um per pixel: from oil immersion, oversampled, to an overview at half a magnification."""
MAX_DENSITY_MPP = 4.0
"""um per pixel, 6350 dpi: beyond it a bare resolution is that of a scanner for paper or film."""
MppSource = str
"""Where an image's or slide's um per pixel is from: one of the three words that follow, or what in
the file states it, such as "OME-XML"."""
FROM_REQUEST = "request"
ASSUMED = "model (assumed)"
UNKNOWN = "unknown"
_PRINTERS_DPI = (6400, 7200, 8000, 9600, 10_000, 12_000, 12_800, 14_400, 19_200)
"""Beyond 6350 dpi: what flat-bed and film scanners interpolate to."""
_PRINTER_TOLERANCE = 0.001
"""Relative; PNG stores whole pixels per metre."""
_SQUARE = 0.01
"""Share by which the sides of a pixel may differ and it still counts as a square (our choice)."""
MAX_ASPECT = 4.0
"""How often one side of a pixel may hold the other (our choice): beyond it, the file is wrong, or
the image was squeezed so far that it shows no tissue."""
_BARE_UNITS = (1e4, UM_PER_INCH)
"""Units that ImageJ takes over from a bare resolution."""
_RESOLUTION_UNITS = {2: UM_PER_INCH, 3: 1e4, 4: 1e3, 5: 1.0}
"""ResolutionUnit of TIFF and EXIF: inch, centimetre; millimetre and micrometre as tifffile and
EXIF's focal plane have them; 1 is none."""


class PixelSize(NamedTuple):
    """um per pixel along each axis of an image."""

    x: float
    """Along a row."""
    y: float
    """Along a column."""

    @property
    def mean(self) -> float:
        """Side of the square with the same area."""
        return self.x if self.x == self.y else math.sqrt(self.x * self.y)

    @property
    def aspect(self) -> float:
        """How often the shorter side fits into the longer one."""
        return max(self) / min(self)

    @property
    def turned(self) -> "PixelSize":
        """Of the same image turned by a quarter."""
        return PixelSize(self.y, self.x)

    def __str__(self) -> str:
        return f"{self.x:.4g}" if self.x == self.y else f"{self.x:.4g} x {self.y:.4g}"


Mpp = float | PixelSize
"""um per pixel: one number where pixels are squares."""


@dataclass(frozen=True)
class Stated:
    """What a file says of its scale."""

    pixel_size: PixelSize | None = None
    """um per pixel, if the file states them believably. They may be too unequal to be used, which
    `check_aspect` refuses."""
    source: MppSource = UNKNOWN
    """Where the file states it, such as "OME-XML"."""
    note: str = ""
    """What the file states and is not believed, and why; a sentence."""

    @property
    def mpp(self) -> float | None:
        """Side of the square with a pixel's area."""
        return None if self.pixel_size is None else self.pixel_size.mean


def sides_of(mpp: Mpp) -> PixelSize:
    """The um per pixel along each axis."""
    return mpp if isinstance(mpp, PixelSize) else PixelSize(mpp, mpp)


def check_aspect(size: PixelSize, source: str) -> None:
    """Raise ImageError for pixels whose sides are too unequal to be resampled."""
    if size.aspect > MAX_ASPECT:
        raise ImageError(
            f"{source} says {size} um per pixel: one side is {size.aspect:.3g} times the other, "
            f"expected at most {MAX_ASPECT:g}. Correct the file, or state its um per pixel.",
            code="pixel_aspect",
        )


def contradiction(
    stated: PixelSize | None, source: MppSource, given: float | None
) -> tuple[str, ...]:
    """A note where the caller's um per pixel is another than the file's, which does not count."""
    if stated is None or given is None:
        return ()
    if all(abs(given - side) <= _CONTRADICTION * side for side in stated):
        return ()
    return (f"{source} says {stated} um per pixel, {given:g} {CONTRADICTED}",)


def check_mpp(mpp: float) -> None:
    """Raise OptionError unless `mpp` is what a microscope can give."""
    if not MIN_MPP <= mpp <= MAX_MPP:  # false for not-a-number too
        raise OptionError(
            f"mpp is {mpp:g} um per pixel, expected {MIN_MPP:g} to {MAX_MPP:g}. Leave it out if it "
            "is not known."
        )


def judge(x: float, y: float, source: str, *, is_bare: bool = False) -> Stated:
    """Decide whether to believe the um per pixel along x and y.

    Args:
        x: um per pixel along a row.
        y: um per pixel along a column.
        source: where the file states it.
        is_bare: it is a resolution as printers have one, not a microscope's length per pixel.
    """
    if not all(math.isfinite(value) and value > 0 for value in (x, y)):
        return Stated()
    size, highest = PixelSize(x, y), MAX_DENSITY_MPP if is_bare else MAX_MPP
    if is_bare and (max(size) > highest or _is_printers(x) or _is_printers(y)):
        dpi = PixelSize(*(UM_PER_INCH / side for side in size))
        reason = (
            f"{_whole(dpi)} dpi ({size} um per pixel), a resolution of screens, printers and "
            "flat-bed scanners"
        )
    elif size.aspect > MAX_ASPECT:
        return Stated(size, source)
    elif min(size) < MIN_MPP or max(size) > highest:
        reason = f"{size} um per pixel, but that is believed only from {MIN_MPP:g} to {highest:g}"
    else:
        is_square = size.aspect - 1 <= _SQUARE
        return Stated(PixelSize(size.mean, size.mean) if is_square else size, source)
    return Stated(
        note=f"{source} says {reason}. It is not used: state the um per pixel if you know it."
    )


def _whole(size: PixelSize) -> str:
    return f"{size.x:.0f}" if round(size.x) == round(size.y) else f"{size.x:.0f} x {size.y:.0f}"


def _is_printers(mpp: float) -> bool:
    dpi = UM_PER_INCH / mpp
    return any(abs(dpi / known - 1) < _PRINTER_TOLERANCE for known in _PRINTERS_DPI)


def density(x: float, y: float, um: float, source: str) -> Stated:
    """What a bare resolution says: `x` and `y` pixels in a length of `um` micrometres."""
    if not (x > 0 and y > 0):
        return Stated()
    return judge(um / x, um / y, source, is_bare=True)


def resolution(x: float, y: float, unit: int, source: str) -> Stated:
    """What the resolution tags of TIFF and EXIF say: pixels along x and y in their unit."""
    um = _RESOLUTION_UNITS.get(unit)
    return Stated() if um is None else density(x, y, um, source)


def tiff_mpp(
    descriptions: Sequence[bytes],
    tags: tuple[float, float] | None,
    unit: int,
    *,
    size: tuple[int, int] = (0, 0),
) -> Stated:
    """What a TIFF states: in OME-XML, Aperio's or ImageJ's description, or by its resolution tags.

    The first that states a believable one counts; the notes of those before are dropped then.

    Args:
        descriptions: tag ImageDescription of the page that is read, and of the first page.
        tags: XResolution and YResolution of the page that is read.
        unit: its tag ResolutionUnit; 2 where it has none (TIFF 6.0).
        size: width and height of that page, to find its part of the OME-XML.
    """
    candidates = []
    for description in descriptions:
        images = read_ome(description)
        candidates += [
            ome_mpp(image_of_size(images, *size), size),
            _aperio_mpp(aperio_sides(description, size)),
            _imagej_mpp(read_imagej(description), tags),
        ]
        if candidates[-1].note:  # its unit says how the tags are meant, and is not believed
            return first_believed(candidates)
    if tags is not None:
        candidates.append(resolution(*tags, unit, "TIFF resolution"))
    return first_believed(candidates)


def first_believed(candidates: list[Stated]) -> Stated:
    """The first candidate that states a size of use, else one of any size, else one with a note."""
    sized = [stated for stated in candidates if stated.pixel_size is not None]
    usable = [s for s in sized if s.pixel_size is not None and s.pixel_size.aspect <= MAX_ASPECT]
    noted = [stated for stated in candidates if stated.note]
    return next(iter([*usable, *sized, *noted]), Stated())


def ome_mpp(image: OmeImage | None, size: tuple[int, int] = (0, 0)) -> Stated:
    """PhysicalSizeX and Y of OME-XML, by default in micrometres.

    Args:
        image: of the OME-XML.
        size: width and height of the page. OME-XML of another size is of an image that was cut or
            made smaller since, nobody knows which, and is not believed.
    """
    if image is None:
        return Stated()
    axes = [axis for axis in "XY" if f"PhysicalSize{axis}" in image.attributes]
    values = []
    for axis in axes:
        um = um_per_unit(image.attributes.get(f"PhysicalSize{axis}Unit", "um"))
        length = number(image.attributes[f"PhysicalSize{axis}"])
        if um is None or length is None:
            return Stated()
        values.append(length * um)
    if not values:
        return Stated()
    stated = judge(values[0], values[-1], "OME-XML")
    own = image.size("X"), image.size("Y")
    if "SizeX" not in image.attributes or own in (size, size[::-1]) or stated.pixel_size is None:
        return stated
    return Stated(
        note=f"OME-XML says {stated.pixel_size} um per pixel of an image of {own[0]} x {own[1]} "
        f"pixels, this one has {size[0]} x {size[1]}. It is not used: state the um per pixel if "
        "you know it."
    )


def _aperio_mpp(sides: tuple[float, float] | None) -> Stated:
    return Stated() if sides is None else judge(*sides, "Aperio MPP")


def _imagej_mpp(properties: dict[str, str], tags: tuple[float, float] | None) -> Stated:
    """ImageJ's resolution tags count in its own unit, which the description names."""
    if tags is None or "unit" not in properties:
        return Stated()
    x_um = um_per_unit(properties["unit"])
    y_um = um_per_unit(properties.get("yunit", properties["unit"]))
    if x_um is None or y_um is None or not min(tags) > 0:
        return Stated()
    x, y = x_um / tags[0], y_um / tags[1]
    return judge(x, y, "ImageJ unit", is_bare=x_um in _BARE_UNITS)
