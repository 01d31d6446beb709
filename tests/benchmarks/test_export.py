import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import export_cpu, export_cpu_worker, export_gpu, export_gpu_worker
from benchmarks.export_cpu import CpuBenchmark, CpuReport
from benchmarks.export_gpu import GpuBenchmark, NoGpuError
from benchmarks.export_gpu_report import GpuReport
from benchmarks.export_gpu_variants import VARIANTS, Answer, Compute, Task, Variant, engine_plan
from benchmarks.real_size_model import draw_tiles
from export.errors import FocalPathError
from tests.support import ROOT
from tests.support.errors import raises
from tests.support.toy_data import toy_settings

pytestmark = pytest.mark.slow

MODEL = toy_settings().model


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graphs of the benchmarks' model in miniature, exported once."""
    folder = tmp_path_factory.mktemp("graphs")
    assert export_gpu_worker.write_graphs(MODEL, folder, "chunked") is None
    return folder


def test_the_baseline_gives_the_labels_of_our_model():
    images, work = draw_tiles(2, MODEL.tile_size_px), {"model": asdict(MODEL)}
    direct, ours = (export_cpu_worker.VARIANTS[name](work)(images) for name in ("direct", "torch"))
    assert direct.min() >= 1
    np.testing.assert_array_equal(direct, ours)


def test_the_cpu_benchmark_writes_what_its_variants_measured(
    tmp_path: Path, graphs: Path, monkeypatch: pytest.MonkeyPatch
):
    def export(deployable: object, path: Path, *, opset: int) -> None:
        shutil.copyfile(graphs / "chunked.fp32.logits.onnx", path)

    monkeypatch.setattr(export_cpu, "export_onnx", export)
    report = CpuBenchmark(
        out=tmp_path, rounds=2, variants=("onnx",), matmul_size=64, model=MODEL
    ).run()
    direct, onnx = report.measurements
    assert (direct.variant, onnx.variant) == ("direct", "onnx")
    assert onnx.label_agreement > 0.999
    # ONNX Runtime's process has no torch.
    assert onnx.peak_memory_mib < direct.peak_memory_mib
    assert len(onnx.seconds) == 2
    assert CpuReport.model_validate_json((tmp_path / "benchmark.json").read_bytes()) == report
    assert onnx.label in (tmp_path / "benchmark.md").read_text(encoding="utf-8")


def test_without_a_gpu_the_benchmark_says_so_and_ends_with_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = ["--batch-sizes", "2", "8", "--image-encoder", "vit_l"]
    monkeypatch.setattr(sys, "argv", ["benchmark_gpu", *options])
    with pytest.raises(SystemExit) as ended:
        export_gpu.main()
    assert ended.value.code == NoGpuError.exit_status == 2
    assert "make benchmark-export" in capsys.readouterr().err


ONE_PER_LOADER = (
    "SAM-Path, PyTorch eager fp32",
    "PyTorch eager fp32",
    "folded, fused attention, bf16 + compile",
    "ONNX Runtime fp32",
    "ONNX Runtime fp16, as served",
    "TensorRT fp16",
)
"""Others differ from one of these in precision, options or the graph's form of attention."""


def test_a_dry_run_calls_every_loader():
    loaders = {
        name: getattr(variant.load, "func", variant.load) for name, variant in VARIANTS.items()
    }
    assert {loaders[name] for name in ONE_PER_LOADER} == set(loaders.values())


@pytest.fixture
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares a start of torch per variant."""

    @contextmanager
    def here() -> Iterator[object]:
        yield lambda function, *arguments: function(*arguments)

    monkeypatch.setattr(export_gpu, "_own_process", here)


@pytest.mark.usefixtures("_in_this_process")
def test_the_gpu_benchmark_runs_dry_on_the_cpu(tmp_path: Path, graphs: Path):
    report = GpuBenchmark(
        out=tmp_path,
        device="cpu",
        batch_sizes=(2,),  # more of them are in the next test: each is compiled anew
        variants=ONE_PER_LOADER,
        runs=1,
        peak_size=64,
        graphs=graphs,
        model=MODEL,
    ).run()
    assert [row.variant for row in report.measurements] == list(ONE_PER_LOADER[:-1])
    assert all(row.stages.compute_ms > 0 for row in report.measurements)
    assert min(row.label_agreement for row in report.measurements) > 0.9
    assert GpuReport.model_validate_json((tmp_path / "benchmark_gpu.json").read_bytes()) == report
    assert "- TensorRT fp16 did not run: " in (tmp_path / "benchmark_gpu.md").read_text()


def darkness(task: Task) -> Compute:
    return lambda images: Answer(images[..., 0])


def not_installed(task: Task) -> Compute:
    raise ModuleNotFoundError("No module named 'tensorrt'")


def without_memory(task: Task) -> Compute:
    def compute(images: torch.Tensor) -> Answer:
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6 GiB")
        return Answer(images[..., 0])

    return compute


def killed(task: Task) -> Compute:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("_in_this_process")
def test_what_fails_loses_neither_other_variants_nor_what_was_measured_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loads: dict[str, Callable[[Task], Compute]] = {
        "broken": not_installed,
        "small": without_memory,
        "good": darkness,
        "killed": killed,
    }
    variants = {name: Variant(load) for name, load in loads.items()}
    for module in (export_gpu, export_gpu_worker):
        monkeypatch.setattr(module, "VARIANTS", variants)
    benchmark = GpuBenchmark(
        out=tmp_path,
        device="cpu",
        batch_sizes=(1, 2, 4),
        variants=tuple(variants),
        runs=1,
        peak_size=8,
        model=MODEL,
    )
    with pytest.raises(KeyboardInterrupt):
        benchmark.run()
    report = GpuReport.model_validate_json((tmp_path / "benchmark_gpu.json").read_bytes())
    ran = [(row.variant, row.batch_size) for row in report.measurements]
    assert ran == [("small", 1), ("good", 1), ("good", 2), ("good", 4)]
    assert {row.label_agreement for row in report.measurements} == {1.0}
    assert list(report.skipped) == ["broken", "small, batch 2"]
    assert report.skipped["broken"] == "ModuleNotFoundError: No module named 'tensorrt'"
    assert "out of memory" in report.skipped["small, batch 2"]


def test_a_process_that_dies_is_a_failure_and_not_the_end():
    with export_gpu._own_process() as call:
        died = call(os._exit, 1)
    assert isinstance(died, export_gpu_worker.Failed)


def test_tensorrts_plan_for_the_benchmark_is_for_its_graph_and_one_batch(tmp_path: Path):
    (tmp_path / "extended.fp16.onnx").write_bytes(b"graph")
    task = Task(
        variant="TensorRT fp16, extended",
        folder=tmp_path,
        model=MODEL,
        device="cuda",
        batch_sizes=(1, 4),
        num_runs=1,
    )
    plan = engine_plan(task, "9.0", 4)
    assert plan.onnx_file == "extended.fp16.onnx"
    assert plan.batch.sizes == (1, 4)


def test_an_unknown_variant_is_refused_before_any_work(tmp_path: Path):
    benchmark = GpuBenchmark(out=tmp_path / "out", variants=("TensorRT fp16", "nonsense"))
    with raises(FocalPathError, "nonsense", "TensorRT fp16"):
        benchmark.run()
    assert not (tmp_path / "out").exists()


def _make(folder: Path, nvidia_smi: str) -> subprocess.CompletedProcess[str]:
    """`make benchmark-gpu` with a driver and a Python that only notes what it is told."""
    programs = folder / "bin"
    programs.mkdir()
    (programs / "nvidia-smi").write_text(f"#!/bin/sh\n{nvidia_smi}\n")
    (programs / "python").write_text(
        f"""#!/bin/sh
echo "$@" >> {folder}/calls
case "$*" in *tensorrt*) exit 1;; esac
if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp {programs}/python "$3/bin/python"; fi
"""
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    return subprocess.run(
        [
            *("make", "benchmark-gpu", "RESULTS=results"),
            *(f"PYTHON={programs}/python", f"VENV_GPU={folder}/venv"),
        ],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "MAKEFLAGS": ""},
        capture_output=True,
        text=True,
    )


def test_make_installs_nothing_for_the_gpu_where_there_is_none(tmp_path: Path):
    found = _make(tmp_path, "exit 9")
    assert found.returncode == 2
    assert "nvidia-smi finds no GPU" in found.stderr
    assert not (tmp_path / "calls").exists()


def test_make_measures_in_an_environment_of_its_own_also_without_tensorrt(tmp_path: Path):
    found = _make(tmp_path, "echo GPU 0")
    assert found.returncode == 0, found.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "--editable .[export-gpu]" in calls[-3]
    assert "--editable .[tensorrt]" in calls[-2]
    assert "TensorRT could not be installed" in found.stderr
    assert calls[-1] == "-m benchmarks.export_gpu --out results/export"
