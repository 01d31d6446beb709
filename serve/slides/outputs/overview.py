"""One picture of a slide and its result: what a person looks at first."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from serve.answers.pictures import rgb_png
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


def write_overview(result: SlideResult, path: Path) -> None:
    """The slide, the slide with the classes over it, a scale bar, and the areas per class."""
    slide, labels = _small(result)
    height, width = labels.shape
    beside = width <= height  # the two pictures; else one below the other
    columns, rows = (2, 1) if beside else (1, 2)
    left = _MARGIN + columns * width + (columns - 1) * _GAP + _MARGIN
    lines = len(result.summary.classes) + 6
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
    _draw_scale(draw, (_MARGIN, _MARGIN + height), width, um_per_px)
    _draw_legend(draw, left, result.summary)
    path.write_bytes(rgb_png(canvas))


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


def _draw_scale(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], width: int, um_per_px: float
) -> None:
    """A bar of a round length in the lower left corner of a picture."""
    least = min(_LEAST_SCALE_PX, width / 3)
    um = next((um for um in _SCALES_UM if um / um_per_px >= least), _SCALES_UM[-1])
    length = um / um_per_px
    x, y = corner[0] + 14, corner[1] - 16
    font = ImageFont.load_default(15)
    text = f"{um / 1000:g} mm" if um >= 1000 else f"{um} um"
    box_width = max(length, draw.textlength(text, font)) + 16
    draw.rectangle((x - 8, y - 26, x + box_width - 8, y + 9), fill=_PAPER)
    draw.rectangle((x, y, x + length, y + 3), fill=_TEXT)
    draw.text((x, y - 6), text, fill=_TEXT, font=font, anchor="lb")


def _draw_legend(draw: ImageDraw.ImageDraw, left: int, summary: SlideSummary) -> None:
    title, plain = ImageFont.load_default(20), ImageFont.load_default(16)
    right, y = left + _LEGEND_PX - _MARGIN, _MARGIN
    draw.text((left, y), _fitting(draw, summary.name, title, right - left), _TEXT, title)
    y += _LINE + 4
    scanned = f"{summary.width_px} x {summary.height_px} px, {summary.mpp:g} um per pixel"
    for text in (scanned, f"{summary.model.name} {summary.model.version}"):
        draw.text((left, y), _fitting(draw, text, plain, right - left), _FAINT, plain)
        y += _LINE
    found = f"Tissue {summary.tissue_mm2:.2f} mm2" if summary.has_tissue else "No tissue found"
    draw.text((left, y + 6), found, _TEXT, plain)
    y += _LINE + 14
    for entry in sorted(summary.classes, key=lambda entry: -entry.cells):
        draw.rectangle((left, y + 2, left + 16, y + 18), fill=entry.color)
        color = _TEXT if entry.cells else _FAINT
        share = f"{100 * (entry.tissue_share or 0):.1f} %"
        area = f"{entry.area_mm2:.2f} mm2"
        name = _fitting(draw, entry.name, plain, right - left - 26 - 180)
        draw.text((left + 26, y), name, color, plain)
        draw.text((right - 75, y), area, color, plain, anchor="ra")
        draw.text((right, y), share, color, plain, anchor="ra")
        y += _LINE
    draw.text((left, y + 6), "Research use only. Not for diagnosis.", _FAINT, plain)


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
