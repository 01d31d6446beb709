"""The benchmark of training on a GPU as Markdown."""

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

_TITLES = {
    "steps": "A step of a batch that lies on the GPU",
    "loaders": "An epoch whose tiles worker processes decode and augment",
    "pretraining": "A step of pretraining",
}
_UNITS = {
    "step_s": ("ms per step", 1000, ".0f"),
    "tiles_per_s": ("tiles per second", 1, ".1f"),
    "samples_per_s": ("samples per second", 1, ".0f"),
    "loaded_per_s": ("samples loaded per second", 1, ".0f"),
    "memory_gib": ("peak GiB", 1, ".1f"),
    "busy": ("step over loop", 100, ".0f%"),
    "utilisation": ("GPU-Util", 100, ".0f%"),
}
"""Heading, factor and format of each measure; other columns are printed as they are."""


def markdown(report: Mapping[str, Any]) -> str:
    """Tables of all that was measured."""
    settings = report["settings"]
    parts = [
        "# Training on a GPU",
        f"{report['machine']}, {report['cpus']} CPU cores, torch {report['torch']}. "
        f"SAM {settings['image_encoder']} and ViT-S/16 with random weights, tiles of "
        f"{settings['tile_size_px']} px, medians of {settings['repeats']} steps.",
    ]
    for name, title in _TITLES.items():
        if rows := report[name]:
            parts += [f"## {title}", _table(rows)]
    return "\n\n".join(parts) + "\n"


def _table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "out_of_memory"))
    heads = [_UNITS[name][0] if name in _UNITS else name.replace("_", " ") for name in columns]
    cells = [[_cell(row, name) for name in columns] for row in rows]
    return tabulate(cells, heads, tablefmt="github", disable_numparse=True)


def _cell(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return "out of memory" if row.get("out_of_memory") and name == "step_s" else "-"
    if name not in _UNITS:
        return str(value)
    _, factor, style = _UNITS[name]
    percent = "%" if style.endswith("%") else ""
    return f"{value * factor:{style.removesuffix('%')}}{percent}"
