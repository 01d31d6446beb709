"""How long one answer takes: in this process, over HTTP, or on Triton."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from serve.segmenter import ImageSegmenter

_CPU_INFO = Path("/proc/cpuinfo")


class Machine(BaseModel):
    """What the times were measured on."""

    processor: str
    num_cpus: int
    system: str
    python: str
    onnxruntime: str


class Latency(BaseModel):
    """Times of one way to segment one size of image, one request after the other."""

    route: str
    model: str
    image_size_px: int
    num_requests: int
    median_ms: float
    p95_ms: float
    images_per_second: float


class Report(BaseModel):
    """All that one run of the benchmark measured."""

    machine: Machine
    latencies: tuple[Latency, ...]


def describe_machine() -> Machine:
    """Describe the machine this runs on."""
    processor = platform.processor() or platform.machine()
    if _CPU_INFO.is_file():
        lines = _CPU_INFO.read_text(encoding="utf-8").splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = models[0] if models else processor
    return Machine(
        processor=processor,
        num_cpus=os.cpu_count() or 1,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        onnxruntime=onnxruntime.__version__,
    )


def noise_image(size_px: int, seed: int = 0) -> NDArray[np.uint8]:
    """A (size, size, 3) uint8 image that no codec can shrink: the worst case for transfers."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (size_px, size_px, 3), np.uint8)


def measure(
    segmenter: ImageSegmenter,
    image: NDArray[np.uint8],
    *,
    route: str,
    num_requests: int,
    num_warm_up: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> Latency:
    """Segment `image` again and again and time each answer.

    Args:
        segmenter: what answers.
        image: (H, W, 3) uint8.
        route: how the segmenter is reached, for the report.
        num_requests: answers that are timed.
        num_warm_up: answers before these.
        clock: seconds, increasing.
    """
    for _ in range(num_warm_up):
        segmenter.segment(image)
    times_ms = []
    for _ in range(num_requests):
        start = clock()
        segmenter.segment(image)
        times_ms.append((clock() - start) * 1000)
    manifest = segmenter.manifest
    return Latency(
        route=route,
        model=f"{manifest.name} {manifest.version}",
        image_size_px=max(image.shape[:2]),
        num_requests=num_requests,
        median_ms=float(np.median(times_ms)),
        p95_ms=float(np.percentile(times_ms, 95)),
        images_per_second=1000 * num_requests / sum(times_ms),
    )


def print_report(report: Report) -> None:
    """Print the report as a table."""
    machine = report.machine
    table = Table(
        title=f"{machine.processor}, {machine.num_cpus} CPUs, ONNX Runtime {machine.onnxruntime}"
    )
    table.add_column("route")
    for title in ("image px", "requests", "median ms", "p95 ms", "images/s"):
        table.add_column(title, justify="right")
    for row in report.latencies:
        table.add_row(
            row.route,
            str(row.image_size_px),
            str(row.num_requests),
            f"{row.median_ms:.1f}",
            f"{row.p95_ms:.1f}",
            f"{row.images_per_second:.1f}",
        )
    Console().print(table)
