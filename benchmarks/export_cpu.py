"""Compares the exported graph with SAM-Path as published, on the CPU: `make benchmark-export`.

Every variant runs in its own process, and the variants take turns; see `benchmarks.harness`.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tyro
from rich.console import Console

from benchmarks.harness import (
    machine_line,
    median_speedup,
    one_line_errors,
    packages_text,
    take_turns,
    write_report,
)
from benchmarks.real_size_model import build_benchmark_model, draw_tiles, model_line
from export.graph.nodes import PARITY_OUTPUT
from export.graph.reference import Deployable
from export.graph.to_onnx import drop_output, export_onnx
from export.precision.half import convert_to_half
from export.precision.int8 import quantize_int8
from serve.contract import openvino
from serve.contract.machine import installed_versions, usable_cpus
from serve.contract.markdown import markdown_table
from serve.contract.strict import Strict
from train.settings import ModelSettings

BASELINE = "direct"
LABELS = {
    "direct": "(a) SAM-Path, PyTorch eager fp32",
    "direct_fused": "(a') the same, fused attention in its ViT-S",
    "torch": "(b) FocalPath, PyTorch eager fp32",
    "compiled": "(c) FocalPath, torch.compile fp32",
    "onnx": "(d) exported graph, ONNX Runtime fp32",
    "onnx23": "(d') opset 23, ONNX Runtime fp32",
    "openvino_fp32": "(d'') exported graph, OpenVINO fp32",
    "int8": "(e) int8 graph, ONNX Runtime",
    "openvino_bf16": "(e') bf16 graph, OpenVINO",
}
_PACKAGES = ("torch", "onnxruntime", openvino.PACKAGE, "onnx", "segment-anything", "timm")


class CpuMeasurement(Strict):
    """The measurement of one variant."""

    variant: str
    label: str
    seconds: tuple[float, ...]
    """One value per round."""
    median_seconds: float
    speedup: float
    """Median over the rounds of (a)'s time divided by this variant's."""
    peak_memory_mib: float
    label_agreement: float
    """Share of pixels with the same label as (a)."""
    first_seconds: float
    """Time to load, compile and run once."""


class CpuReport(Strict):
    """The content of `benchmark.json`."""

    machine: str
    num_cpus: int
    load_average: tuple[float, ...]
    """Averages over one minute, before and after. Above `num_cpus`, others used the machine too."""
    versions: dict[str, str]
    model: str
    tile_size_px: int
    num_rounds: int
    matmul_gflops: float
    """Rate of PyTorch's product of two large matrices in float32, median over the rounds. It is not
    an upper limit: ONNX Runtime and OpenVINO multiply faster on AMD processors."""
    measurements: tuple[CpuMeasurement, ...]


@dataclass(frozen=True, kw_only=True)
class CpuBenchmark:
    """Compare the exported graph with the published model on this machine's CPU."""

    out: Path = Path("artifacts/results/export")
    """Folder for benchmark.json and benchmark.md."""
    rounds: int = 3
    """Number of turns of each variant."""
    variants: tuple[str, ...] = tuple(LABELS)
    """Variants to measure; (a) is always measured."""
    matmul_size: int = 4096
    """Side of the square matrices whose product measures the machine."""
    model: ModelSettings = field(default_factory=ModelSettings)

    def run(self) -> CpuReport:
        """Export, measure, and write both files."""
        console = Console(stderr=True)
        variants = [name for name in self.variants if _runs_here(name)]
        with tempfile.TemporaryDirectory(prefix="focalpath-benchmark-") as name:
            folder = Path(name)
            console.print("Exporting")
            _prepare(folder, self.model, variants)
            report = self._measure(folder, [*dict.fromkeys([BASELINE, *variants])], console)
        write_report(self.out, "benchmark", report, markdown(report))
        return report

    def _measure(self, folder: Path, variants: Sequence[str], console: Console) -> CpuReport:
        load_before = os.getloadavg()[0]
        work = {
            "folder": str(folder),
            "model": asdict(self.model),
            "matmul_size": self.matmul_size,
        }
        with ExitStack() as stack:
            workers, firsts = {}, {}
            for name in (*variants, "matmul"):  # one after another, so that loading is undisturbed
                workers[name] = stack.enter_context(_worker(name, work))
                firsts[name] = _answer(workers[name])["first_s"]
                console.print(f"{LABELS.get(name, name)}: ready after {firsts[name]:.1f} s")
            answers = take_turns(
                {name: partial(_ask, worker) for name, worker in workers.items()},
                self.rounds,
                tell=console.print,
            )
        matmul_s = statistics.median(answer["seconds"] for answer in answers.pop("matmul"))
        matmul_flops = 2 * self.matmul_size**3 / matmul_s
        return CpuReport(
            machine=machine_line(),
            num_cpus=usable_cpus(),
            load_average=(load_before, os.getloadavg()[0]),
            versions=installed_versions(_PACKAGES),
            model=model_line(self.model),
            tile_size_px=self.model.tile_size_px,
            num_rounds=self.rounds,
            matmul_gflops=matmul_flops / 1e9,
            measurements=tuple(_measurements(answers, firsts, folder)),
        )


def markdown(report: CpuReport) -> str:
    """Write the report as a table, with the notes that it needs."""
    table = markdown_table(
        ("variant", "seconds per tile", "times as fast", "peak memory", "same label as (a)"),
        [
            (
                row.label,
                f"{row.median_seconds:.2f}",
                f"{row.speedup:.2f}",
                f"{row.peak_memory_mib / 1024:.2f} GiB",
                f"{row.label_agreement:.3%}",
            )
            for row in report.measurements
        ],
        align="lrrrr",
    )
    before, after = report.load_average
    return f"""# The exported graph on a CPU

{report.machine}; {packages_text(report.versions)}.
{report.model}; one tile of {report.tile_size_px} pixels; {report.num_rounds} rounds in which the \
variants take turns. Written by `make benchmark-export`.

{table}

PyTorch multiplies float32 matrices at {report.matmul_gflops:.0f} GFLOP/s here.
Load before and after: {before:.1f} and {after:.1f}. The weights are random, so logits nearly tie, \
and labels flip more easily than a trained model's: the agreement is a lower bound. Memory is that \
of the whole process, including its Python packages.
"""


def _runs_here(variant: str) -> bool:
    if not variant.startswith("openvino"):
        return True
    return openvino.problem("bf16" if variant == "openvino_bf16" else "fp32") is None


def _prepare(folder: Path, settings: ModelSettings, variants: Sequence[str]) -> None:
    np.save(folder / "images.npy", draw_tiles(1, settings.tile_size_px))
    deployable = Deployable(build_benchmark_model(settings)).eval()
    for opset, name in ((20, "model.onnx"), (23, "model.opset23.onnx")):
        if opset == 23 and "onnx23" not in variants:
            continue
        source = folder / "with_logits.onnx"
        export_onnx(deployable, source, opset=opset)
        drop_output(source, folder / name, PARITY_OUTPUT)
        if opset == 20 and "openvino_bf16" in variants:
            # Converts the graph that still has the exporter's metadata, which names the blocks.
            onnx.save(convert_to_half(onnx.load(str(source)), "bf16"), str(source))
            drop_output(source, folder / "model.bf16.onnx", PARITY_OUTPUT)
    if "int8" in variants:
        quantize_int8(folder / "model.onnx", folder / "model.int8.onnx")


def _measurements(
    answers: Mapping[str, Sequence[Mapping[str, float]]],
    firsts: Mapping[str, float],
    folder: Path,
) -> Iterator[CpuMeasurement]:
    baseline = [answer["seconds"] for answer in answers[BASELINE]]
    expected = np.load(folder / f"{BASELINE}.labels.npy")
    for name, rounds in answers.items():
        seconds = tuple(answer["seconds"] for answer in rounds)
        labels = np.load(folder / f"{name}.labels.npy")
        yield CpuMeasurement(
            variant=name,
            label=LABELS[name],
            seconds=seconds,
            median_seconds=statistics.median(seconds),
            speedup=median_speedup(baseline, seconds),
            peak_memory_mib=rounds[-1]["peak_memory_mib"],
            label_agreement=float((labels == expected).mean()),
            first_seconds=firsts[name],
        )


Worker = subprocess.Popen[str]


@contextmanager
def _worker(variant: str, work: Mapping[str, Any]) -> Iterator[Worker]:
    command = [sys.executable, "-m", "benchmarks.export_cpu_worker", variant, json.dumps(work)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _ask(worker: Worker) -> dict[str, float]:
    assert worker.stdin is not None, "made with a pipe"
    worker.stdin.write("\n")
    worker.stdin.flush()
    return _answer(worker)


def _answer(worker: Worker) -> dict[str, float]:
    assert worker.stdout is not None, "made with a pipe"
    line = worker.stdout.readline()
    if not line:
        sys.exit(f"error: {' '.join(map(str, worker.args))} ended without an answer, see above")  # type: ignore[arg-type]
    answer: dict[str, float] = json.loads(line)
    return answer


@one_line_errors()
def main() -> None:
    """Run the benchmark and print its table."""
    config: Any = (tyro.conf.OmitArgPrefixes,)
    report = tyro.cli(CpuBenchmark, prog="python -m benchmarks.export_cpu", config=config).run()
    sys.stdout.write(markdown(report))


if __name__ == "__main__":
    main()
