"""Measures training on a GPU: steps by batch size, epochs with real loaders, and pretraining.

    steps        one step of a batch that lies on the GPU, variants beside each other
    loaders      Lightning's loop over images that worker processes decode and augment
    pretraining  the gpu preset of `train pretrain`

Without a GPU everything runs on the CPU, to try it out: with small sizes, it says nothing.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from tabulate import tabulate

from benchmarks.harness import one_line_errors, write_report
from benchmarks.training_gpu_loaders import measure_loaders
from benchmarks.training_gpu_steps import GpuBenchmarkSettings, Part, Row, measure_steps
from benchmarks.training_model import machine
from serve.contract.machine import usable_cpus
from train.data.synthetic.slides import SlideSettings, write_slides
from train.pretraining.settings import gpu
from train.pretraining.speed import measure_speed

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


@dataclass
class Report:
    """What was measured."""

    machine: str
    cpus: int
    torch: str
    settings: dict[str, Any]
    steps: list[Row] = field(default_factory=list)
    loaders: list[Row] = field(default_factory=list)
    pretraining: list[Row] = field(default_factory=list)


def run_benchmark(settings: GpuBenchmarkSettings) -> Report:
    """Measure, and write what is there after each part, so that an interruption loses one."""
    options = {name: value for name, value in asdict(settings).items() if name != "out"}
    report = Report(machine(), usable_cpus(), torch.__version__, options)
    parts: dict[Part, Callable[..., Iterator[Row]]] = {
        "steps": measure_steps,
        "loaders": measure_loaders,
        "pretraining": measure_pretraining,
    }
    console = Console(soft_wrap=True, highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        for part in settings.parts:
            for row in parts[part](settings, Path(folder)):
                getattr(report, part).append(row)
                console.print(" ".join(f"{name}={_short(v)}" for name, v in row.items()))
                content = asdict(report)
                write_report(settings.out, "benchmark", content, markdown(content))
    return report


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def measure_pretraining(settings: GpuBenchmarkSettings, folder: Path) -> Iterator[Row]:
    """The gpu preset on drawn slides."""
    slides = folder / "slides"
    drawn = SlideSettings(num_train=3, num_validation=0, num_test=0, side_um=settings.slide_um)
    write_slides(slides, drawn)
    preset = gpu()
    schedule = replace(
        preset.schedule,
        batch_size=settings.pretraining_batch,
        num_workers=max(settings.num_workers),
    )
    speed = measure_speed(replace(preset, schedule=schedule), slides, settings.pretraining_steps)
    yield {
        "preset": preset.preset,
        "batch_size": speed.batch_size,
        "workers": schedule.num_workers,
        "step_s": speed.step_s,
        "samples_per_s": speed.batch_size / speed.step_s,
        "loaded_per_s": speed.batch_size / speed.load_s,
        "memory_gib": speed.memory_gib,
    }


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


@one_line_errors()
def main() -> None:
    """Run the benchmark."""
    config = (tyro.conf.OmitArgPrefixes,)
    prog = "python -m benchmarks.training_gpu"
    run_benchmark(tyro.cli(GpuBenchmarkSettings, prog=prog, config=config))


if __name__ == "__main__":
    main()
