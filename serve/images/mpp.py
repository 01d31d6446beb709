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
import re
import unicodedata
from dataclasses import dataclass
from typing import NamedTuple

from serve.contract.errors import ImageError, OptionError
from serve.images.imagej import as_text, read_imagej
from serve.images.ome import OmeImage, image_of_size, read_ome

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
_UM_PER_INCH = 25_400.0
_PRINTERS_DPI = (6400, 7200, 8000, 9600, 10_000, 12_000, 12_800, 14_400, 19_200)
"""Beyond 6350 dpi: what flat-bed and film scanners interpolate to."""
_PRINTER_TOLERANCE = 0.001
"""Relative; PNG stores whole pixels per metre."""
_SQUARE = 0.01
"""Share by which the sides of a pixel may differ and it still counts as a square (our choice)."""
MAX_ASPECT = 4.0
"""How often one side of a pixel may hold the other (our choice): beyond it, the file is wrong, or
the image was squeezed so far that it shows no tissue."""
_UM_PER_UNIT = {
    1.0: ("um", "\u03bcm", "micron", "micrometer", "micrometre", "\u03bc"),
    1e-3: ("nm", "nanometer", "nanometre"),
    1e-4: ("\u00e5", "angstrom", "\u00e5ngstr\u00f6m"),
    1e-6: ("pm", "picometer", "picometre"),
    1e3: ("mm", "millimeter", "millimetre"),
    1e4: ("cm", "centimeter", "centimetre"),
    1e5: ("dm", "decimeter", "decimetre"),
    1e6: ("m", "meter", "metre"),
    25.4: ("thou", "mil"),
    25_400.0 / 72: ("pt", "point"),
    _UM_PER_INCH: ("in", "inch", "inches", '"'),
}
_UNITS = {name: um for um, names in _UM_PER_UNIT.items() for name in names}
_BARE_UNITS = (1e4, _UM_PER_INCH)
"""Units that ImageJ takes over from a bare resolution."""
_TIFF_UNITS = {2: _UM_PER_INCH, 3: 1e4}
"""TIFF's ResolutionUnit: inch, centimetre; 1 is none."""
_APERIO_MPP = re.compile(r"\|\s*MPP\s*=\s*([0-9.,]{1,32})\s*(?:\||$)")
_MAX_DESCRIPTION = 2**16


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


def um_per_unit(name: str) -> float | None:
    """Micrometres in a unit of length, however it is spelt; None for pixels and unknown words."""
    word = unicodedata.normalize("NFKC", name).strip().casefold()
    return _UNITS.get(word, _UNITS.get(word.removesuffix("s")))


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
        dpi = PixelSize(*(_UM_PER_INCH / side for side in size))
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
    dpi = _UM_PER_INCH / mpp
    return any(abs(dpi / known - 1) < _PRINTER_TOLERANCE for known in _PRINTERS_DPI)


def density(x: float, y: float, um: float, source: str) -> Stated:
    """What a bare resolution says: `x` and `y` pixels in a length of `um` micrometres."""
    if not (x > 0 and y > 0):
        return Stated()
    return judge(um / x, um / y, source, is_bare=True)


def tiff_mpp(
    description: bytes,
    resolution: tuple[float, float] | None,
    resolution_unit: int,
    *,
    size: tuple[int, int] = (0, 0),
) -> Stated:
    """What a TIFF states: in OME-XML, Aperio's or ImageJ's description, or by its resolution tags.

    The first that states a believable one counts; the notes of those before are dropped then.

    Args:
        description: tag ImageDescription of the first page, with its bytes.
        resolution: tags XResolution and YResolution of the page that is read.
        resolution_unit: its tag ResolutionUnit; 2 where it has none (TIFF 6.0).
        size: width and height of that page, to find its part of the OME-XML.
    """
    properties = read_imagej(description)
    candidates = [
        ome_mpp(image_of_size(read_ome(description), *size)),
        _aperio_mpp(description),
        _imagej_mpp(properties, resolution),
    ]
    um = _TIFF_UNITS.get(resolution_unit)
    if resolution is not None and um is not None and not candidates[-1].note:
        candidates.append(density(*resolution, um, "TIFF resolution"))
    return first_believed(candidates)


def first_believed(candidates: list[Stated]) -> Stated:
    """The first candidate that states a size of use, else one of any size, else one with a note."""
    sized = [stated for stated in candidates if stated.pixel_size is not None]
    usable = [s for s in sized if s.pixel_size is not None and s.pixel_size.aspect <= MAX_ASPECT]
    noted = [stated for stated in candidates if stated.note]
    return next(iter([*usable, *sized, *noted]), Stated())


def ome_mpp(image: OmeImage | None) -> Stated:
    """PhysicalSizeX and Y of OME-XML, by default in micrometres."""
    if image is None:
        return Stated()
    values = []
    for axis in "XY" if "PhysicalSizeY" in image.attributes else "XX":
        um = um_per_unit(image.attributes.get(f"PhysicalSize{axis}Unit", "um"))
        size = _number(image.attributes.get(f"PhysicalSize{axis}", ""))
        if um is None or size is None:
            return Stated()
        values.append(size * um)
    return judge(values[0], values[1], "OME-XML")


def _aperio_mpp(description: bytes) -> Stated:
    text = as_text(description[:_MAX_DESCRIPTION])
    found = _APERIO_MPP.search(text) if text.startswith("Aperio") else None
    size = None if found is None else _number(found[1])
    return Stated() if size is None else judge(size, size, "Aperio MPP")


def _imagej_mpp(properties: dict[str, str], resolution: tuple[float, float] | None) -> Stated:
    """ImageJ's resolution tags count in its own unit, which the description names."""
    if resolution is None or "unit" not in properties:
        return Stated()
    x_um = um_per_unit(properties["unit"])
    y_um = um_per_unit(properties.get("yunit", properties["unit"]))
    if x_um is None or y_um is None or not min(resolution) > 0:
        return Stated()
    x, y = x_um / resolution[0], y_um / resolution[1]
    return judge(x, y, "ImageJ unit", is_bare=x_um in _BARE_UNITS)


def _number(text: str) -> float | None:
    """A number; programs write a decimal comma where the system does."""
    try:
        return float(text.replace(",", "."))
    except ValueError:
        return None
