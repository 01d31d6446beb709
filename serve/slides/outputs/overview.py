"""One picture of a slide and its result: what a person looks at first."""

import unicodedata
from pathlib import Path

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from serve.slides.outputs.format import SlideFormat, SlideResult
from serve.slides.summary import SlideSummary

_LONGEST_PX = 1200
"""Of each of the two pictures."""
_MARGIN, _GAP, _LINE = 24, 16, 26
_LEGEND_PX = 460
_TEXT, _FAINT, _PAPER = "#1f2328", "#59636e", "#ffffff"
_OVERLAY = 0.45
_SCALES_UM = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
_LEAST_SCALE_PX = 90
_LEAST_MM2 = 0.0001


def write_overview(result: SlideResult, path: Path) -> None:
    """The slide, the slide with the classes over it, a scale bar, and the areas per class."""
    slide, labels = _small(result)
    height, width = labels.shape
    beside = width <= height  # the two pictures; else one below the other
    columns, rows = (2, 1) if beside else (1, 2)
    left = _MARGIN + columns * width + (columns - 1) * _GAP + _MARGIN
    lines = len(result.summary.classes) + 7
    body = max(rows * height + (rows - 1) * _GAP, lines * _LINE)
    canvas = Image.new("RGB", (left + _LEGEND_PX, body + 2 * _MARGIN), _PAPER)
    draw = ImageDraw.Draw(canvas)
    second = (_MARGIN + width + _GAP, _MARGIN) if beside else (_MARGIN, _MARGIN + height + _GAP)
    overlay = _overlay(slide, labels, result)
    for picture, place in ((Image.fromarray(slide), (_MARGIN, _MARGIN)), (overlay, second)):
        canvas.paste(picture, place)
        draw.rectangle(
            (place[0] - 1, place[1] - 1, place[0] + width, place[1] + height), outline="#d1d9e0"
        )
    um_per_px = result.plan.um_per_cell * result.plan.shape[1] / width
    _draw_legend(draw, left, result.summary, um_per_px)
    path.write_bytes(_png(canvas))


def _png(picture: Image.Image) -> bytes:
    """A PNG with the same filter for all rows: Pillow's search for the best takes twice the time.

    It has 5% more bytes.
    """
    png = imagecodecs.PNG
    options = {"strategy": png.STRATEGY.RLE, "filter": png.FILTER.UP}
    return bytes(imagecodecs.png_encode(np.asarray(picture), png.COMPRESSION.SPEED, **options))


def _small(result: SlideResult) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The slide and its labels, at most `_LONGEST_PX` on a side."""
    rows, columns = result.plan.shape
    scale = min(_LONGEST_PX / max(rows, columns), 4)
    height, width = max(round(rows * scale), 1), max(round(columns * scale), 1)
    level = 0
    while level + 1 < result.num_levels and max(result.labels(level + 1).shape) >= max(
        height, width
    ):
        level += 1
    found = np.asarray(result.labels(level)[:])
    nearest = Image.fromarray(found).resize((width, height), Image.Resampling.NEAREST)
    thumbnail = result.reader.thumbnail(result.plan.um_per_cell * columns / width)
    fitted = Image.fromarray(thumbnail).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(fitted), np.asarray(nearest)


def _overlay(
    slide: NDArray[np.uint8], labels: NDArray[np.uint8], result: SlideResult
) -> Image.Image:
    """The slide with each class in its colour and a darker line around it."""
    colors = result.colors
    edge = np.zeros(labels.shape, bool)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, :-1] |= labels[:, 1:] == 0  # beside glass, which has no line of its own
    edge[:-1] |= labels[1:] == 0
    picture = Image.fromarray(slide)
    found = Image.blend(picture, _painted(labels, colors), _OVERLAY)
    found.paste(_painted(labels, colors // 4 * 3), mask=Image.fromarray(edge))
    found.paste(picture, mask=Image.fromarray(labels == 0))
    return found


def _painted(labels: NDArray[np.uint8], colors: NDArray[np.uint8]) -> Image.Image:
    """Labels in the colours of a palette, (256, 3) uint8."""
    image = Image.fromarray(labels)
    image.putpalette(colors.tobytes())
    return image.convert("RGB")


def _draw_legend(
    draw: ImageDraw.ImageDraw, left: int, summary: SlideSummary, um_per_px: float
) -> None:
    title, plain = ImageFont.load_default(20), ImageFont.load_default(16)
    right, y = left + _LEGEND_PX - _MARGIN, _MARGIN
    name = _in_ascii(summary.name, "slide")
    draw.text((left, y), _fitting(draw, name, title, right - left), _TEXT, title)
    y += _LINE + 4
    scanned = f"{summary.width_px} x {summary.height_px} px, {summary.mpp:g} um per pixel"
    model = _in_ascii(f"{summary.model.name} {summary.model.version}", "")
    for text in (scanned, model):
        draw.text((left, y), _fitting(draw, text, plain, right - left), _FAINT, plain)
        y += _LINE
    _draw_scale(draw, (left, y + 6), um_per_px, plain)
    y += _LINE + 4
    found = f"Tissue {_area(summary.tissue_mm2)}" if summary.has_tissue else "No tissue found"
    draw.text((left, y + 6), found, _TEXT, plain)
    y += _LINE + 14
    for entry in sorted(summary.classes, key=lambda entry: -entry.cells):
        draw.rectangle((left, y + 2, left + 16, y + 18), fill=entry.color)
        color = _TEXT if entry.cells else _FAINT
        share = f"{100 * (entry.tissue_share or 0):.1f} %"
        name = _in_ascii(entry.name, f"label {entry.label}")
        name = _fitting(draw, name, plain, right - left - 26 - 180)
        draw.text((left + 26, y), name, color, plain)
        draw.text((right - 75, y), _area(entry.area_mm2), color, plain, anchor="ra")
        draw.text((right, y), share, color, plain, anchor="ra")
        y += _LINE
    draw.text((left, y + 6), "Research use only. Not for diagnosis.", _FAINT, plain)


def _draw_scale(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    um_per_px: float,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """A bar of a round length; beside the pictures, which may be smaller than it."""
    x, y = corner
    um = next((um for um in _SCALES_UM if um / um_per_px >= _LEAST_SCALE_PX), _SCALES_UM[-1])
    end = x + um / um_per_px
    draw.rectangle((x, y + 8, end, y + 11), fill=_TEXT)
    draw.text((end + 10, y), f"{um / 1000:g} mm" if um >= 1000 else f"{um} um", _TEXT, font)


def _area(mm2: float) -> str:
    if 0 < mm2 < _LEAST_MM2:
        return f"<{_LEAST_MM2} mm2"
    return f"{mm2:.2f} mm2" if mm2 >= 0.1 or not mm2 else f"{mm2:.4f} mm2"


def _in_ascii(text: str, instead: str) -> str:
    """The text in letters that Pillow's font has: accents are left out, other letters are `?`."""
    letters = (one for one in unicodedata.normalize("NFKD", text) if not unicodedata.combining(one))
    found = "".join(letters).encode("ascii", "replace").decode()
    return found if any(map(str.isalnum, found)) else instead


def _fitting(
    draw: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    width: float,
) -> str:
    text = " ".join(text.split())  # one line
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(f"{text}...", font) > width:
        text = text[:-1]
    return f"{text}..."


OVERVIEW = SlideFormat(
    name="overview",
    title="Overview",
    description="a picture of the slide, its classes and their areas",
    file="{name}.overview.png",
    media_type="image/png",
    write=write_overview,
)
