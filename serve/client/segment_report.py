"""What `focalpath-segment` says about its images: a CSV of all, and lines on the terminal."""

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from serve.images.mpp import CONTRADICTED
from serve.inference.summary import Summary

_IMAGE_COLUMNS = ("image", "width_px", "height_px", "mpp", "mpp_source", "model", "version")
_CLASS_COLUMNS = (
    "label",
    "name",
    "pixel_count",
    "pixel_share",
    "area_um2",
    "mean_confidence",
    "low_confidence_share",
    "predicted_iou",
)


def summary_csv(summaries: Mapping[Path, Summary]) -> bytes:
    """A CSV with one row per image and class."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([*_IMAGE_COLUMNS, *_CLASS_COLUMNS])
    writer.writerows(_rows(summaries))
    return text.getvalue().encode()


def _rows(summaries: Mapping[Path, Summary]) -> Iterator[list[object]]:
    for path, summary in summaries.items():
        image, model = summary.image, summary.model
        about = [path.name, image.width_px, image.height_px, image.mpp, image.mpp_source]
        for row in summary.classes:
            numbers = [getattr(row, column) for column in _CLASS_COLUMNS]
            yield [*about, model.name, model.version, *numbers]


def assumed_line(summaries: Mapping[Path, Summary]) -> str:
    """For how many images the um per pixel was assumed: their labels may be of another scale."""
    assumed = [path for path, summary in summaries.items() if not summary.image.is_mpp_known]
    text = f"um per pixel: assumed for {len(assumed)} of {len(summaries)} images"
    others = [p for p in summaries if any(CONTRADICTED in n for n in summaries[p].image.notes)]
    if others:
        text += f"; {len(others)} files, such as {others[0].name}, state another than --mpp"
    if not assumed:
        return text
    example = next((p for p in assumed if summaries[p].image.mpp_note), assumed[0])
    why = f" {summaries[example].image.mpp_note}".rstrip()
    return f"{text}, such as {example.name}. State it with --mpp if you know it.{why}"


def image_table(path: Path, summary: Summary) -> Table:
    """A table for the terminal with one row per class."""
    image = summary.image
    title = f"{path.name}, {image.width_px} x {image.height_px}, {image.scale}"
    for note in (image.mpp_note, *image.notes):
        title += f"\n{note}" if note else ""
    table = Table(title=escape(title))
    table.add_column("class")
    for heading in ("share", "mean confidence", "predicted IoU"):
        table.add_column(heading, justify="right")
    for row in summary.classes:
        confidence = "" if row.mean_confidence is None else f"{row.mean_confidence:.2f}"
        iou = "" if row.predicted_iou is None else f"{row.predicted_iou:.2f}"
        table.add_row(escape(row.name), f"{row.pixel_share:.1%}", confidence, iou)
    return table
