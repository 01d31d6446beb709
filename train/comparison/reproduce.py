"""The commands that make a comparison again, from the settings that it was made with."""

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train.comparison.compare import Comparison
from train.comparison.methods import paper_rows
from train.data.convert.registry import CONVERTERS
from train.settings import PRESETS, Settings


def commands(comparison: Comparison) -> list[str]:
    """The shell's lines: the data set, where it was made by `prepare`, then the comparison."""
    preset = comparison.settings.preset
    compare = ["python", "-m", "train", "compare", preset, "--data", "DATA", "--out", "OUT"]
    compare += ["--seeds", str(len(comparison.seeds))]
    names = tuple(row.name for row in comparison.rows)
    if names != paper_rows():
        compare += ["--rows", *names]
    compare += _flags(shareable(comparison.settings), asdict(PRESETS[preset]()))
    return [*_prepare(comparison.data.root), shlex.join(compare)]


def shareable(settings: Settings) -> dict[str, Any]:
    """The settings without this machine's folders: files by their name, the cache as CACHE."""
    values = asdict(settings)
    weights = values["weights"]
    for name in ("sam_weights", "pathology_weights"):
        weights[name] = weights[name] and Path(weights[name]).name
    if values["runtime"]["embedding_cache"] is not None:
        values["runtime"]["embedding_cache"] = "CACHE"
    return values


def _prepare(data: Path) -> Iterator[str]:
    try:
        recipe = json.loads((data / "settings.json").read_text(encoding="utf-8"))
        source = recipe.get("source", "synthetic")
        default = json.loads(json.dumps(asdict(CONVERTERS[source].settings())))
    except (OSError, ValueError, AttributeError, KeyError):
        return  # not made by us
    places = [*(name.upper() for name in CONVERTERS[source].inputs), "DATA"]
    command = ["python", "-m", "train", "prepare", source, *places]
    yield shlex.join(command + _flags(recipe, default))


def _flags(values: Mapping[str, Any], default: Mapping[str, Any]) -> list[str]:
    """What of `values` differs from the default, as the command line takes it."""
    found: list[str] = []
    for name, usual in default.items():
        value = values.get(name, usual)
        flag = name.replace("_", "-")
        if isinstance(usual, Mapping):
            found += _flags(value, usual)
        elif value == usual:
            continue
        elif isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list | tuple):
            found += [f"--{flag}", *map(str, value)]
        else:
            found += [f"--{flag}", str(value)]
    return found
