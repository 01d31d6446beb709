import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export.engine import (
    ENGINE_REPORT_FILE,
    GateError,
    WrongMachineError,
    build_engine,
    load_tensorrt,
)
from export.engine_builder import EngineError
from export.engine_check import (
    EngineReport,
    count_attention,
    log_probability_difference,
)
from export.engine_plan import EnginePlan, container_command, plan_for, read_engine_plan
from serve.errors import BundleError, FocalPathError
from serve.manifest import Manifest, read_bundle
from tests.fake_tensorrt import FakeGpu, FakeTensorRT, Outputs
from tests.toy_bundle import TILE_SIZE_PX

IMAGES = np.random.default_rng(0).integers(0, 256, (3, TILE_SIZE_PX, TILE_SIZE_PX, 3), np.uint8)


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))
    _plan(folder).write(folder)
    return folder


@pytest.fixture
def trt() -> FakeTensorRT:
    return FakeTensorRT()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.engine_check.WARM_UP_RUNS", 1)
    monkeypatch.setattr("export.engine_check.MEASURED_RUNS", 3)


def _plan(bundle: Path, **changes: object) -> EnginePlan:
    manifest = read_bundle(bundle)
    return plan_for(manifest, manifest.artefacts[0]).model_copy(update=changes)


def _build(bundle: Path, trt: FakeTensorRT, gpu: FakeGpu | None = None) -> Path:
    return build_engine(bundle, images=IMAGES, trt=trt, gpu=gpu or FakeGpu())


def _content(bundle: Path) -> dict[str, bytes]:
    return {str(p.relative_to(bundle)): p.read_bytes() for p in bundle.rglob("*") if p.is_file()}


def _report(bundle: Path) -> EngineReport:
    return EngineReport.model_validate_json((bundle / ENGINE_REPORT_FILE).read_text())


class TestPlan:
    def test_it_names_the_graph_by_its_checksum(self, bundle: Path) -> None:
        artefact = read_bundle(bundle).artefacts[0]
        plan = read_engine_plan(bundle)
        assert (plan.onnx_file, plan.onnx_sha256) == ("model.onnx", artefact.sha256)

    def test_its_profile_goes_from_one_tile_to_the_servers_largest_batch(
        self, bundle: Path
    ) -> None:
        assert read_engine_plan(bundle).batch.sizes == (1, 4, 8)

    def test_a_profile_of_one_batch_size_is_measured_once(self, bundle: Path) -> None:
        manifest = read_bundle(bundle).model_copy(update={"max_batch_size": 1})
        assert plan_for(manifest, manifest.artefacts[0]).batch.sizes == (1,)

    def test_an_optimum_above_the_largest_batch_is_refused(self, bundle: Path) -> None:
        manifest = read_bundle(bundle)
        with pytest.raises(ValueError, match="opt is 9, expected 1 to max, 8"):
            plan_for(manifest, manifest.artefacts[0], opt_batch_size=9)

    def test_it_targets_an_a100_in_nvidias_container(self, bundle: Path) -> None:
        plan = read_engine_plan(bundle)
        assert plan.compute_capability == "8.0"
        assert plan.hardware_compatibility_level == "none"
        assert plan.container_image == "nvcr.io/nvidia/tensorrt:26.06-py3"
        assert plan.serving_image == "nvcr.io/nvidia/tritonserver:26.06-py3"

    @pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("fp16", True)])
    def test_a_float32_plan_does_not_round_to_tf32(
        self, bundle: Path, precision: str, allowed: bool
    ) -> None:
        manifest = read_bundle(bundle)
        artefact = manifest.artefacts[0].model_copy(update={"precision": precision})
        assert plan_for(manifest, artefact).allow_tf32 is allowed

    def test_an_int8_graph_is_refused(self, bundle: Path) -> None:
        manifest = read_bundle(bundle)
        artefact = manifest.artefacts[0].model_copy(update={"precision": "int8"})
        with pytest.raises(FocalPathError, match="int8; TensorRT builds from onnx in fp32"):
            plan_for(manifest, artefact)

    @pytest.mark.parametrize(
        ("version", "taken"),
        [("10.15.9", False), ("10.16.1.11", True), ("11.4.0.106", True), ("12.0.0", False)],
    )
    def test_it_takes_the_versions_that_the_code_was_checked_with(
        self, bundle: Path, version: str, taken: bool
    ) -> None:
        assert read_engine_plan(bundle).takes_version(version) is taken

    def test_an_unknown_field_is_refused(self, bundle: Path) -> None:
        path = bundle / "engine_plan.json"
        path.write_text(path.read_text().replace('"precision"', '"accuracy"'))
        with pytest.raises(BundleError, match="engine_plan.json cannot be followed"):
            read_engine_plan(bundle)

    def test_a_bundle_without_a_plan_says_to_export_again(self, bundle: Path) -> None:
        (bundle / "engine_plan.json").unlink()
        with pytest.raises(BundleError, match="Export the checkpoint again"):
            read_engine_plan(bundle)


class TestWrongMachine:
    def test_without_tensorrt_it_ends_with_the_container_command(
        self, bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        with pytest.raises(WrongMachineError, match="TensorRT cannot be imported") as caught:
            build_engine(bundle)
        command = str(caught.value).splitlines()[-1]
        assert command.startswith("docker run --rm --gpus all")
        assert f"{bundle}:/bundle" in command
        assert command.endswith("python3 -m export engine /bundle'")

    def test_its_exit_status_is_2(self) -> None:
        assert WrongMachineError("").exit_status == 2

    def test_nothing_is_written(self, bundle: Path) -> None:
        before = _content(bundle)
        with pytest.raises(WrongMachineError):
            _build(bundle, FakeTensorRT(version="9.3.0"))
        assert _content(bundle) == before

    def test_another_version_is_named_with_the_range(self, bundle: Path) -> None:
        with pytest.raises(WrongMachineError, match=r"here is 9\.3\.0, the plan is for 10\.16"):
            _build(bundle, FakeTensorRT(version="9.3.0"))

    def test_another_gpu_is_refused(self, bundle: Path, trt: FakeTensorRT) -> None:
        with pytest.raises(WrongMachineError, match=r"capability 9\.0, the plan is for 8\.0"):
            _build(bundle, trt, FakeGpu(compute_capability="9.0"))

    def test_no_gpu_is_said_as_such(
        self, bundle: Path, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(WrongMachineError, match="no CUDA device"):
            build_engine(bundle, trt=trt)

    def test_the_command_runs_the_plans_own_image(self, bundle: Path) -> None:
        plan = _plan(bundle, container_image="nvcr.io/nvidia/tensorrt:26.08-py3")
        assert "nvcr.io/nvidia/tensorrt:26.08-py3" in container_command(plan, bundle)


def test_another_graph_than_planned_is_refused_on_any_machine(bundle: Path) -> None:
    _plan(bundle, onnx_sha256="0" * 64).write(bundle)
    with pytest.raises(BundleError, match=r"its SHA-256 is [0-9a-f]{64}, .* expects 0{64}"):
        build_engine(bundle)


def test_broken_tensorrt_libraries_are_the_machines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(WrongMachineError, match="libnvinfer"):
        load_tensorrt()


def test_images_of_another_size_are_refused(bundle: Path, trt: FakeTensorRT) -> None:
    with pytest.raises(FocalPathError, match=r"are \(1, 32, 32, 3\) uint8, expected \(N, 64, 64"):
        build_engine(bundle, images=np.zeros((1, 32, 32, 3), np.uint8), trt=trt)


class TestBuild:
    def test_the_network_is_strongly_typed(self, bundle: Path, trt: FakeTensorRT) -> None:
        _build(bundle, trt)
        assert trt.network_flags == 1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED

    def test_the_configuration_is_the_plans(self, bundle: Path, trt: FakeTensorRT) -> None:
        _plan(bundle, workspace_bytes=123, builder_optimization_level=2).write(bundle)
        _build(bundle, trt)
        config = trt.config
        assert config is not None
        assert config.pools == {trt.MemoryPoolType.WORKSPACE: 123}
        assert config.builder_optimization_level == 2
        assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
        assert config.flags == {trt.BuilderFlag.TF32: False}

    def test_the_profile_covers_the_plans_batches(self, bundle: Path, trt: FakeTensorRT) -> None:
        _build(bundle, trt)
        assert trt.config is not None
        assert trt.config.profiles == [{"image": ((1, 64, 64, 3), (4, 64, 64, 3), (8, 64, 64, 3))}]

    def test_every_error_of_the_parser_is_listed_with_its_node(
        self, bundle: Path, trt: FakeTensorRT
    ) -> None:
        trt.parser_errors = [("node_a", "no such operator"), ("node_b", "axes must be constant")]
        with pytest.raises(EngineError) as caught:
            _build(bundle, trt)
        assert "node_a: no such operator" in str(caught.value)
        assert "node_b: axes must be constant" in str(caught.value)

    def test_no_plan_is_a_failure(self, bundle: Path, trt: FakeTensorRT) -> None:
        trt.builds = False
        with pytest.raises(EngineError, match="built no plan from model.onnx"):
            _build(bundle, trt)

    def test_a_build_that_fails_leaves_the_bundle_as_it_was(
        self, bundle: Path, trt: FakeTensorRT
    ) -> None:
        before = _content(bundle)
        trt.builds = False
        with pytest.raises(EngineError):
            _build(bundle, trt)
        assert _content(bundle) == before

    def test_an_interrupted_build_ends_as_an_interrupt(
        self, bundle: Path, trt: FakeTensorRT
    ) -> None:
        trt.interrupt_at_step = 1
        with pytest.raises(KeyboardInterrupt):
            _build(bundle, trt)

    def test_the_timing_cache_is_kept_for_the_next_build(
        self, bundle: Path, trt: FakeTensorRT
    ) -> None:
        _build(bundle, trt)
        _build(bundle, trt)
        assert (bundle / "timing.cache").read_bytes() == b"++"

    def test_a_timing_cache_of_another_gpu_is_not_used(
        self, bundle: Path, trt: FakeTensorRT
    ) -> None:
        (bundle / "timing.cache").write_bytes(b"other gpu")
        _build(bundle, trt)
        assert (bundle / "timing.cache").read_bytes() == b"+"


class TestCheck:
    def test_a_plan_that_passes_is_in_the_manifest(self, bundle: Path, trt: FakeTensorRT) -> None:
        path = _build(bundle, trt)
        artefact = read_bundle(bundle).artefacts[-1]
        assert path == bundle / artefact.file == bundle / "model.plan"
        assert (artefact.format, artefact.precision) == ("tensorrt_plan", "fp32")
        assert artefact.tensorrt is not None
        assert artefact.tensorrt.version == "11.0.0.114"
        assert artefact.tensorrt.compute_capability == "8.0"

    def test_building_again_replaces_the_plan(self, bundle: Path, trt: FakeTensorRT) -> None:
        _build(bundle, trt)
        _build(bundle, trt)
        assert [a.file for a in read_bundle(bundle).artefacts] == ["model.onnx", "model.plan"]

    def test_it_is_measured_at_each_batch_of_the_profile(
        self, bundle: Path, trt: FakeTensorRT
    ) -> None:
        _build(bundle, trt)
        report = _report(bundle)
        assert [batch.batch_size for batch in report.batches] == [1, 4, 8]
        assert all(batch.label_agreement == 1 for batch in report.batches)
        assert all(0 < b.latency.p50_ms <= b.latency.p99_ms for b in report.batches)

    def test_it_runs_on_the_gpus_stream(self, bundle: Path, trt: FakeTensorRT) -> None:
        _build(bundle, trt)
        assert trt.stream == FakeGpu.stream_handle

    def test_drawn_tissue_stands_in_for_missing_images(
        self, bundle: Path, trt: FakeTensorRT
    ) -> None:
        build_engine(bundle, trt=trt, gpu=FakeGpu())
        assert _report(bundle).num_tiles == 4

    def test_fused_attention_is_counted_by_the_kernels_name_alone(
        self, bundle: Path, trt: FakeTensorRT
    ) -> None:
        trt.layers = ["_gemm_mha_v2_myl0_1", "fmha_v2_flash", "node_MatMul", "kgen_alphamhabeta"]
        _build(bundle, trt)
        assert _report(bundle).num_fused_attention == 2

    @pytest.mark.parametrize("batch", [1, 4, 8])
    def test_wrong_labels_at_one_batch_size_fail_the_gate(
        self, bundle: Path, trt: FakeTensorRT, batch: int
    ) -> None:
        def distort(outputs: Outputs) -> Outputs:
            if len(outputs["labels"]) == batch:
                outputs["labels"] = outputs["labels"] % 5 + 1
            return outputs

        trt.distort = distort
        with pytest.raises(GateError, match=f"at batch {batch}, expected 99.5%"):
            _build(bundle, trt)

    def test_one_nan_fails_the_gate(self, bundle: Path, trt: FakeTensorRT) -> None:
        def distort(outputs: Outputs) -> Outputs:
            outputs["iou_scores"][0, 0] = np.nan
            return outputs

        trt.distort = distort
        with pytest.raises(GateError, match="NaN or infinite values at batch 1"):
            _build(bundle, trt)

    def test_a_label_that_is_no_class_fails_the_gate(self, bundle: Path, trt: FakeTensorRT) -> None:
        def distort(outputs: Outputs) -> Outputs:
            outputs["labels"] = outputs["labels"].copy()
            outputs["labels"][0, 0, 0] = 0
            return outputs

        trt.distort = distort
        with pytest.raises(GateError, match="1 pixels with an unknown label at batch 8"):
            _build(bundle, trt)

    def test_failing_the_gate_leaves_no_plan_and_the_manifest_alone(
        self, bundle: Path, trt: FakeTensorRT
    ) -> None:
        before = _content(bundle)
        trt.distort = lambda outputs: outputs | {"labels": outputs["labels"] % 5 + 1}
        with pytest.raises(GateError):
            _build(bundle, trt)
        (bundle / "timing.cache").unlink()  # complete, and of use to the next build
        assert _content(bundle) == before
        assert not list(bundle.glob(".engine-*"))

    def test_an_output_of_another_type_is_refused(self, bundle: Path, trt: FakeTensorRT) -> None:
        trt.output_type = trt.DataType.HALF
        with pytest.raises(EngineError, match="labels is .*HALF.* in the plan, expected .*UINT8"):
            _build(bundle, trt)

    def test_the_float32_graph_is_the_reference_of_a_half_precision_plan(
        self, bundle: Path, trt: FakeTensorRT
    ) -> None:
        manifest = read_bundle(bundle)
        fp32 = manifest.artefacts[0]
        shutil.copy(bundle / "model.onnx", bundle / "model.fp16.onnx")
        fp16 = fp32.model_copy(update={"file": "model.fp16.onnx", "precision": "fp16"})
        changed: Manifest = manifest.model_copy(update={"artefacts": (fp16, fp32)})
        changed.write(bundle)
        plan_for(changed, fp16).write(bundle)
        _build(bundle, trt)
        assert _report(bundle).reference_file == "model.onnx"
        assert read_bundle(bundle).artefacts[-1].precision == "fp16"


class TestMeasures:
    def test_equal_probabilities_do_not_differ(self) -> None:
        assert log_probability_difference(np.uint8([[64]]), np.uint8([[64]])) == 0

    def test_a_halved_probability_differs_by_log_2(self) -> None:
        found = log_probability_difference(np.uint8([128]), np.uint8([64]))
        assert found == pytest.approx(np.log(2))

    def test_probabilities_too_small_for_a_byte_are_passed_over(self) -> None:
        assert log_probability_difference(np.uint8([1, 100]), np.uint8([9, 100])) == 0

    def test_a_softmax_over_classes_is_no_attention(self, bundle: Path) -> None:
        assert count_attention(bundle / "model.onnx") == 0

    def test_a_softmax_into_a_product_is_one(self, tmp_path: Path) -> None:
        assert count_attention(_attention(tmp_path)) == 1

    def test_so_is_one_with_a_cast_between_them(self, tmp_path: Path) -> None:
        assert count_attention(_attention(tmp_path, cast=True)) == 1


def _attention(folder: Path, *, cast: bool = False) -> Path:
    """A graph of a softmax and a product, as half precision writes it with its cast."""
    node = helper.make_node
    weights = "narrow" if cast else "weights"
    nodes = [node("Softmax", ["x"], ["weights"]), node("MatMul", [weights, "x"], ["y"])]
    if cast:
        nodes.insert(1, node("Cast", ["weights"], ["narrow"], to=TensorProto.FLOAT))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4]) for name in "xy")
    onnx.save(helper.make_model(helper.make_graph(nodes, "attention", [x], [y])), folder / "a.onnx")
    return folder / "a.onnx"
