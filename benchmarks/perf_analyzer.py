"""Runs Triton's own `perf_analyzer` beside our measurements, and reads its table."""

import csv
import math
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel

from serve.contract.errors import BackendUnavailableError
from serve.contract.manifest import Manifest

Transport = Literal["HTTP", "gRPC", "shared memory"]
_TIMEOUT_S = 600
WINDOW_MS = 2_000
"""Of one measurement; it takes `_TRIALS` of them."""
_TRIALS = 3
_STABLE_PERCENT = 999
"""Windows may differ by any amount: our own measurements have no such test either."""


class PerfAnalyzerRow(BaseModel):
    """Its measurement of one transport at one concurrency."""

    transport: Transport
    concurrency: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    inferences_per_second: float


def run_perf_analyzer(
    program: Path,
    manifest: Manifest,
    *,
    transport: Transport,
    url: str,
    levels: Sequence[int],
) -> list[PerfAnalyzerRow]:
    """Measure single tiles with perf_analyzer.

    Args:
        program: the executable.
        manifest: of the model that Triton serves.
        transport: how tensors get to Triton.
        url: Triton's HTTP endpoint for "HTTP", else its gRPC one.
        levels: numbers of concurrent requests.

    Raises:
        BackendUnavailableError: perf_analyzer failed.
    """
    rows = []
    for level in levels:
        with tempfile.TemporaryDirectory(prefix="focalpath-perf-") as folder:
            table = Path(folder) / "table.csv"
            command = _command(program, manifest, transport, url, level, table)
            try:
                finished = subprocess.run(
                    command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise BackendUnavailableError(f"{program} did not run: {error}") from error
            if finished.returncode != 0 or not table.is_file():
                message = (finished.stderr.strip() or finished.stdout.strip())[-400:]
                raise BackendUnavailableError(f"{program} failed: {message}")
            rows += read_table(table.read_text(encoding="utf-8"), transport)
    return rows


def read_table(text: str, transport: Transport) -> list[PerfAnalyzerRow]:
    """Read the CSV of `perf_analyzer -f`, whose latencies are in microseconds."""
    rows = []
    for row in csv.DictReader(text.splitlines()):
        rows.append(
            PerfAnalyzerRow(
                transport=transport,
                concurrency=int(row["Concurrency"]),
                p50_ms=float(row["p50 latency"]) / 1000,
                p95_ms=float(row["p95 latency"]) / 1000,
                p99_ms=float(row["p99 latency"]) / 1000,
                inferences_per_second=float(row["Inferences/Second"]),
            )
        )
    return rows


def _command(
    program: Path, manifest: Manifest, transport: Transport, url: str, level: int, table: Path
) -> list[str]:
    (image,) = manifest.inputs
    command = [
        str(program),
        *("-m", manifest.name, "-u", url),
        *("-i", "http" if transport == "HTTP" else "grpc"),
        *("--shape", f"{image.name}:{','.join(map(str, image.shape[1:]))}"),
        *("--concurrency-range", str(level)),
        *("-p", str(WINDOW_MS), "-r", str(_TRIALS), "-s", str(_STABLE_PERCENT)),
        *("-f", str(table)),
    ]
    if transport == "shared memory":
        largest = max(
            math.prod(output.shape[1:]) * np.dtype(output.dtype).itemsize
            for output in manifest.outputs
        )
        command += ["--shared-memory", "system", "--output-shared-memory-size", str(largest)]
    return command
