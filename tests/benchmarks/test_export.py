import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import export_cpu as benchmark
from benchmarks import export_cpu_worker as benchmark_worker
from benchmarks import export_gpu as benchmark_gpu
from benchmarks import export_gpu_variants as gpu_variants
from benchmarks import export_gpu_worker as benchmark_gpu_worker
from benchmarks.export_cpu import CpuBenchmark, CpuMeasurement, CpuReport
from benchmarks.export_gpu import GpuBenchmark, NoGpuError
from benchmarks.export_gpu_report import GpuMeasurement, GpuReport, markdown
from benchmarks.export_gpu_variants import VARIANTS
from benchmarks.export_gpu_worker import Stages
from benchmarks.real_size_model import (
    build_benchmark_model,
    draw_tiles,
    read_model_settings,
    write_model_settings,
)
from export.errors import FocalPathError
from export.graph.attention import AttentionForm
from export.graph.encoders import FoldedSegmenter
from export.graph.reference import Deployable
from tests.support import ROOT
from tests.support.errors import raises
from tests.support.toy_data import toy_settings

pytestmark = pytest.mark.slow

MODEL = toy_settings().model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model_settings(tmp_path, MODEL)
    return tmp_path


def measurement(variant: str, seconds: float, speedup: float) -> CpuMeasurement:
    return CpuMeasurement(
        variant=variant,
        label=benchmark.LABELS[variant],
        seconds=(seconds,),
        median_seconds=seconds,
        speedup=speedup,
        peak_memory_mib=2048,
        label_agreement=0.9991,
        first_seconds=1,
    )


@pytest.fixture
def report() -> CpuReport:
    return CpuReport(
        machine="A processor",
        num_cpus=2,
        load_average=(0.5, 2.0),
        versions={"torch": "2.14.1"},
        model="vit_b",
        tile_size_px=1024,
        num_rounds=1,
        matmul_gflops=290,
        measurements=(measurement("direct", 16, 1), measurement("onnx", 4, 4)),
    )


def test_the_baseline_gives_the_labels_of_our_model(folder: Path):
    images = draw_tiles(2, MODEL.tile_size_px)
    direct = benchmark_worker.VARIANTS["direct"](folder)(images)
    ours = benchmark_worker.VARIANTS["torch"](folder)(images)
    assert direct.min() >= 1
    np.testing.assert_array_equal(direct, ours)


def test_every_worker_builds_the_same_model(folder: Path):
    first, second = (
        build_benchmark_model(read_model_settings(folder)).state_dict() for _ in range(2)
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert first["image_encoder.blocks.0.attn.rel_pos_h"].std() > 0


def test_the_table_names_machine_ratio_memory_and_agreement(report: CpuReport):
    text = benchmark.markdown(report)
    assert f"{report.machine}; torch 2.14.1." in text
    (row,) = (line for line in text.splitlines() if benchmark.LABELS["onnx"] in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:] == ["4.00", "4.00", "2.00 GiB", "99.910%"]
    assert f"{report.matmul_gflops:.0f} GFLOP/s" in text


def test_the_benchmark_writes_what_its_variants_measured(tmp_path: Path):
    report = CpuBenchmark(
        out=tmp_path / "out", rounds=2, variants=("onnx", "int8"), matmul_size=64, model=MODEL
    ).run()
    assert [row.variant for row in report.measurements] == ["direct", "onnx", "int8"]
    direct, onnx, int8 = report.measurements
    assert onnx.label_agreement > 0.999
    assert int8.label_agreement > 0.9
    # ONNX Runtime's process has no torch.
    assert onnx.peak_memory_mib < direct.peak_memory_mib
    assert len(onnx.seconds) == 2
    written = (tmp_path / "out" / "benchmark.json").read_text(encoding="utf-8")
    assert CpuReport.model_validate_json(written) == report
    assert (tmp_path / "out" / "benchmark.md").is_file()


def test_without_a_gpu_the_benchmark_says_so_and_ends_with_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmark_gpu"])
    with pytest.raises(SystemExit) as ended:
        benchmark_gpu.main()
    assert ended.value.code == NoGpuError.exit_status == 2
    assert "make benchmark-export" in capsys.readouterr().err


def test_the_gpu_benchmark_takes_batches_and_model_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch,
):
    seen: list[GpuBenchmark] = []
    monkeypatch.setattr(GpuBenchmark, "run", lambda self: seen.append(self) or gpu_report())
    monkeypatch.setattr(
        sys, "argv", ["benchmark_gpu", "--batch-sizes", "2", "8", "--image-encoder", "vit_l"]
    )
    benchmark_gpu.main()
    assert seen[0].batch_sizes == (2, 8)
    assert seen[0].model.image_encoder == "vit_l"


def gpu_report() -> GpuReport:
    stages = Stages(decode_ms=1, copy_ms=2, compute_ms=10, encode_ms=3, first_run_ms=90)
    return GpuReport(
        device="A GPU",
        versions={},
        model="vit_b",
        tile_size_px=1024,
        num_runs=3,
        peak_tflops=250,
        skipped={"TensorRT fp16": "not installed"},
        measurements=(
            GpuMeasurement(
                variant="PyTorch bf16 + compile",
                batch_size=4,
                stages=stages,
                tiles_per_second=400,
                peak_share=0.512,
                memory_gib=3.5,
                label_agreement=1,
                max_logit_difference=0.25,
                num_not_finite=0,
            ),
        ),
    )


def test_the_gpu_table_tells_the_stages_apart_and_says_what_did_not_run():
    text = markdown(gpu_report())
    (row,) = (line for line in text.splitlines() if "bf16 + compile" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:10] == ["4", "90", "1.0", "2.0", "10.0", "3.0", "400.0", "51.2%", "3.5 GiB"]
    assert cells[11:13] == ["0.25", "0"]
    assert "- TensorRT fp16 did not run: not installed" in text


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


@contextmanager
def in_this_process() -> Iterator[object]:
    yield lambda function, *arguments: function(*arguments)


def test_the_gpu_benchmark_runs_dry_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark_gpu, "_own_process", in_this_process)  # spares 10 starts of torch
    report = GpuBenchmark(
        out=tmp_path,
        device="cpu",
        batch_sizes=(2,),  # more of them are in the next tests: each is compiled anew
        variants=ONE_PER_LOADER,
        runs=1,
        peak_size=64,
        model=MODEL,
    ).run()
    assert [row.variant for row in report.measurements] == list(ONE_PER_LOADER[:-1])
    assert set(report.skipped) == {"TensorRT fp16"}
    assert all(row.stages.compute_ms > 0 for row in report.measurements)
    assert min(row.label_agreement for row in report.measurements) > 0.9
    written = (tmp_path / "benchmark_gpu.json").read_text(encoding="utf-8")
    assert GpuReport.model_validate_json(written) == report


def benchmark_of(
    monkeypatch: pytest.MonkeyPatch,
    out: Path,
    **loads: Callable[[gpu_variants.Task], object],
) -> GpuBenchmark:
    """A benchmark of these variants; none takes a graph."""
    variants = {name: gpu_variants.Variant(load) for name, load in loads.items()}  # type: ignore[arg-type]
    for module in (benchmark_gpu, benchmark_gpu_worker):
        monkeypatch.setattr(module, "VARIANTS", variants)
    monkeypatch.setattr(benchmark_gpu, "_own_process", in_this_process)
    return GpuBenchmark(
        out=out,
        device="cpu",
        batch_sizes=(1, 2, 4),
        variants=tuple(variants),
        runs=1,
        peak_size=8,
        model=MODEL,
    )


def darkness(task: gpu_variants.Task) -> gpu_variants.Compute:
    return lambda images: gpu_variants.Answer(images[..., 0])


def test_a_variant_that_cannot_be_loaded_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def not_installed(task: gpu_variants.Task) -> object:
        raise ModuleNotFoundError("No module named 'tensorrt'")

    report = benchmark_of(monkeypatch, tmp_path, broken=not_installed, good=darkness).run()
    assert report.skipped == {"broken": "ModuleNotFoundError: No module named 'tensorrt'"}
    assert [(row.variant, row.batch_size) for row in report.measurements] == [
        ("good", 1),
        ("good", 2),
        ("good", 4),
    ]


def test_a_batch_that_does_not_fit_keeps_the_smaller_ones_and_the_next_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def small(task: gpu_variants.Task) -> gpu_variants.Compute:
        def compute(images: torch.Tensor) -> gpu_variants.Answer:
            if len(images) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6 GiB")
            return gpu_variants.Answer(images[..., 0])

        return compute

    report = benchmark_of(monkeypatch, tmp_path, small=small, good=darkness).run()
    assert list(report.skipped) == ["small, batch 2"]
    assert "out of memory" in report.skipped["small, batch 2"]
    ran = [(row.variant, row.batch_size) for row in report.measurements]
    assert ran == [("small", 1), ("good", 1), ("good", 2), ("good", 4)]
    assert {row.label_agreement for row in report.measurements} == {1.0}


def test_what_was_measured_is_on_disk_before_the_next_variant_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed(task: gpu_variants.Task) -> object:
        raise KeyboardInterrupt

    benchmark = benchmark_of(monkeypatch, tmp_path, good=darkness, killed=killed)
    with pytest.raises(KeyboardInterrupt):
        benchmark.run()
    written = (tmp_path / "benchmark_gpu.json").read_text(encoding="utf-8")
    assert len(GpuReport.model_validate_json(written).measurements) == 3


def test_a_process_that_dies_is_a_failure_and_not_the_end():
    with benchmark_gpu._own_process() as call:
        died = call(os._exit, 1)
    assert isinstance(died, benchmark_gpu_worker.Failed)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_tensorrts_plan_for_the_benchmark_is_for_its_graph_and_one_batch(
    tmp_path: Path, batch_size: int
):
    (tmp_path / "extended.fp16.onnx").write_bytes(b"graph")
    task = gpu_variants.Task(
        variant="TensorRT fp16, extended",
        folder=tmp_path,
        model=MODEL,
        device="cuda",
        batch_sizes=(1, 4),
        num_runs=1,
    )
    plan = gpu_variants.engine_plan(task, "9.0", batch_size)
    assert plan.onnx_file == "extended.fp16.onnx"
    assert (plan.batch.opt, plan.batch.max) == (batch_size, batch_size)


def test_the_forms_of_attention_are_measured_in_both_runtimes():
    found = {
        (getattr(variant.load, "func", variant.load).__name__, variant.form)
        for variant in VARIANTS.values()
        if variant.form is not None
    }
    runtimes = ("_onnx_runtime", "_tensorrt")
    forms = ("chunked", "unchunked", "extended")
    assert found >= {(runtime, form) for runtime in runtimes for form in forms}


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


def test_torchs_fused_attention_gives_the_same_labels(folder: Path):
    deployable = Deployable(build_benchmark_model(MODEL)).eval()
    images = torch.from_numpy(draw_tiles(2, MODEL.tile_size_px))
    with torch.inference_mode():
        expected = deployable(images)
        form = AttentionForm(max_queries=None, fused=True)
        found = FoldedSegmenter(deployable, form).eval()(images)
    torch.testing.assert_close(found.low_res_logits, expected.low_res_logits, atol=1e-4, rtol=0)
