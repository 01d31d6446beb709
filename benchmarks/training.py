"""Measures a training step and an epoch beside a direct SAM-Path loop, in one run.

Every step takes the same batch, model size (SAM ViT-B, ViT-S/16, 1024 x 1024, random weights), loss
and optimizer. The direct loop follows the published description of SAM-Path (arXiv 2307.09570):
encoders in float32 and eager mode, then one image after another through SAM's own decoder.

An epoch is a complete one, over a few tiles: it reads images or features and labels from the disk,
trains on them, predicts the validation tiles and counts their pixels.
"""

import statistics
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import StringIO
from multiprocessing import get_context
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.harness import median_speedup, one_line_errors, seconds_of, take_turns, write_report
from benchmarks.training_model import machine, peak_memory_gib
from benchmarks.training_variants import BenchmarkSettings, TrainingBenchmark

STEPS = {
    "direct": "direct SAM-Path loop, encoders included",
    "from_images": "ours from images (bfloat16 encoders)",
    "decoder_one_by_one": "SAM's decoder image by image, on given features",
    "from_cache": "ours on features read from the embedding cache",
}
"""Methods of `TrainingBenchmark` that take a step, and their titles."""
EPOCHS = {
    "epoch_from_images": "ours from images (bfloat16 encoders)",
    "epoch_from_cache": "ours from the embedding cache",
}


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one variant's steps or epochs."""

    name: str
    seconds: tuple[float, ...]
    median_s: float
    peak_memory_gib: float | None = None
    """Of a process that runs the variant once: GPU memory, or else resident memory."""


def run_benchmark(settings: BenchmarkSettings) -> dict[str, list[Timing]]:
    """Measure all variants in turns, print tables and write the JSON."""
    with tempfile.TemporaryDirectory() as folder:
        benchmark = TrainingBenchmark(settings, Path(folder))
        timings = {
            "steps": _measure(benchmark, STEPS, settings.repeats),
            "epochs": _measure(benchmark, EPOCHS, settings.repeats),
        }
        del benchmark
        if settings.peak_memory:
            timings = {
                kind: _with_memory(found, settings, folder) for kind, found in timings.items()
            }
    _print(timings, settings)
    _write(timings, settings)
    return timings


def _measure(
    benchmark: TrainingBenchmark, variants: Mapping[str, str], repeats: int
) -> list[Timing]:
    console = Console(stderr=True)
    seconds = take_turns(
        {name: partial(seconds_of, getattr(benchmark, name)) for name in variants},
        repeats,
        tell=console.print,
    )
    return [
        Timing(name=name, seconds=tuple(values), median_s=statistics.median(values))
        for name, values in seconds.items()
    ]


def _with_memory(timings: list[Timing], settings: BenchmarkSettings, folder: str) -> list[Timing]:
    """Add the peak memory of each variant, each measured in a new process."""
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1)
    with pool:
        peaks = pool.map(partial(memory_of_variant, settings, folder), [t.name for t in timings])
        return [replace(t, peak_memory_gib=p) for t, p in zip(timings, peaks, strict=True)]


def memory_of_variant(settings: BenchmarkSettings, folder: str, variant: str) -> float:
    """Peak memory of this process in GiB while it builds the model and runs a variant once."""
    with redirect_stdout(StringIO()):
        getattr(TrainingBenchmark(settings, Path(folder)), variant)()
    return peak_memory_gib()


def _print(timings: Mapping[str, list[Timing]], settings: BenchmarkSettings) -> None:
    titles = {
        "steps": (f"A step of {settings.batch_size} tiles of {settings.tile_size_px} px", STEPS),
        "epochs": (f"An epoch of {settings.epoch_steps} steps, validation included", EPOCHS),
    }
    for kind, found in timings.items():
        title, names = titles[kind]
        table = Table("", title=title)
        for column in ("median s", "times faster", "peak GiB"):
            table.add_column(column, justify="right")
        for timing in found:
            peak = "" if timing.peak_memory_gib is None else f"{timing.peak_memory_gib:.1f}"
            ratio = f"{median_speedup(found[0].seconds, timing.seconds):.1f}"
            table.add_row(names[timing.name], f"{timing.median_s:.2f}", ratio, peak)
        Console().print(table)
    Console().print(machine())


def _write(timings: Mapping[str, list[Timing]], settings: BenchmarkSettings) -> None:
    report = {
        "machine": machine(),
        "torch": torch.__version__,
        **{name: value for name, value in asdict(settings).items() if name != "out"},
        **{
            kind: {
                names[timing.name]: {k: v for k, v in asdict(timing).items() if k != "name"}
                for timing in timings[kind]
            }
            for kind, names in (("steps", STEPS), ("epochs", EPOCHS))
        },
    }
    write_report(settings.out.parent, settings.out.stem, report)


@one_line_errors()
def main() -> None:
    """Run the benchmark and print its tables."""
    config = (tyro.conf.OmitArgPrefixes,)
    run_benchmark(tyro.cli(BenchmarkSettings, prog="python -m benchmarks.training", config=config))


if __name__ == "__main__":
    main()
