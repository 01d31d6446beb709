"""Measures training on a GPU: steps by batch size, epochs with real loaders, and pretraining.

    steps        one step of a batch that lies on the GPU, variants beside each other
    loaders      Lightning's loop over images that worker processes decode and augment
    pretraining  the gpu preset of `train pretrain`

Without a GPU everything runs on the CPU, to try it out: with small sizes, it says nothing.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from benchmarks.harness import one_line_errors, write_report
from benchmarks.training import machine
from benchmarks.training_gpu_loaders import measure_loaders
from benchmarks.training_gpu_report import markdown
from benchmarks.training_gpu_settings import GpuBenchmarkSettings, Part, Row
from benchmarks.training_gpu_steps import measure_steps
from serve.contract.machine import usable_cpus
from train.data.synthetic.slides import SlideSettings, write_slides
from train.pretraining.settings import gpu
from train.pretraining.speed import measure_speed


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


@one_line_errors()
def main() -> None:
    """Run the benchmark."""
    config = (tyro.conf.OmitArgPrefixes,)
    prog = "python -m benchmarks.training_gpu"
    run_benchmark(tyro.cli(GpuBenchmarkSettings, prog=prog, config=config))


if __name__ == "__main__":
    main()
