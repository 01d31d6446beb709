import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from pydantic import ValidationError

from export.errors import BundleError, EngineError, GateError, SettingsError, WrongMachineError
from export.gate.schema import Tolerances
from export.gate.tiles import ValidationTiles
from export.tensorrt.engine import ENGINE_REPORT_FILE, build_engine
from export.tensorrt.plan import EnginePlan, plan_for, read_engine_plan
from export.tensorrt.report import EngineReport
from export.tensorrt.requirements import load_tensorrt
from export.tensorrt.session import count_attention
from serve.contract.interrupts import signals_wake_main_thread
from serve.contract.manifest import Manifest, TensorRTBuild, read_bundle, sha256_of
from tests.support.errors import raises
from tests.support.fake_tensorrt import FakeGpu, FakeTensorRT, Outputs
from tests.support.interrupts import deaf_main_thread
from tests.support.toy_bundle import REFERENCE_RGB, TILE_SIZE_PX

NECROSIS, OTHER = 4, 5


def _tiles(images: np.ndarray, masks: np.ndarray | None = None) -> ValidationTiles:
    names = tuple(f"tile_{index}" for index in range(len(images)))
    return ValidationTiles(source="3 tiles", names=names, images=images, masks=masks)


TILES = _tiles(
    np.random.default_rng(0).integers(0, 256, (3, TILE_SIZE_PX, TILE_SIZE_PX, 3), np.uint8)
)


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
    monkeypatch.setattr("export.tensorrt.session.WARM_UP_RUNS", 1)
    monkeypatch.setattr("export.tensorrt.session.MEASURED_RUNS", 3)


def _plan(bundle: Path, **changes: object) -> EnginePlan:
    manifest = read_bundle(bundle)
    return plan_for(manifest, manifest.artefacts[0]).model_copy(update=changes)


def _build(
    bundle: Path,
    trt: FakeTensorRT,
    gpu: FakeGpu | None = None,
    plan: EnginePlan | None = None,
    tiles: ValidationTiles = TILES,
) -> EngineReport:
    return build_engine(bundle, plan=plan, tiles=tiles, trt=trt, gpu=gpu or FakeGpu())


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
        with raises(ValidationError, "opt is 9", 8):
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
        with raises(SettingsError, "int8", "fp32"):
            plan_for(manifest, artefact)

    @pytest.mark.parametrize(
        ("version", "taken"),
        [("10.16.1.11", False), ("11.0.0.114", True), ("11.0.2", True), ("11.4.0.106", False)],
    )
    def test_it_takes_the_tensorrt_of_the_image_that_serves(
        self, bundle: Path, version: str, taken: bool
    ) -> None:
        assert read_engine_plan(bundle).tensorrt_version == "11.0"
        assert read_engine_plan(bundle).takes_version(version) is taken

    @pytest.mark.parametrize(
        "change",
        [
            {"tensorrt_version": "10.15"},
            {"tensorrt_version": "12.0"},
            {"tensorrt_version": "11"},
            {"compute_capability": "sm_90"},
        ],
    )
    def test_a_server_that_the_builder_does_not_know_is_refused(
        self, bundle: Path, change: dict[str, str]
    ) -> None:
        with raises(SettingsError, "major.minor"):
            read_engine_plan(bundle).for_server(**change)

    def test_the_gates_tolerances_are_those_of_the_export(self, bundle: Path) -> None:
        manifest = read_bundle(bundle)
        tolerances = Tolerances(fp32_agreement=0.9)
        plan_for(manifest, manifest.artefacts[0], tolerances=tolerances).write(bundle)
        assert read_engine_plan(bundle).tolerances == tolerances

    def test_it_tells_a_plan_that_the_serving_image_cannot_load(self, bundle: Path) -> None:
        plan = read_engine_plan(bundle)
        builds = [
            TensorRTBuild(version=version, compute_capability="8.0")
            for version in ("11.0.0.114", "10.16.1.11")
        ]
        assert plan.serving_mismatch(builds[0]) is None
        assert "tritonserver:26.06-py3 has 11.0" in str(plan.serving_mismatch(builds[1]))

    def test_an_unknown_field_is_refused(self, bundle: Path) -> None:
        path = bundle / "engine_plan.json"
        path.write_text(path.read_text().replace('"precision"', '"accuracy"'))
        with raises(BundleError, "engine_plan.json"):
            read_engine_plan(bundle)

    def test_a_bundle_without_a_plan_says_to_export_again(self, bundle: Path) -> None:
        (bundle / "engine_plan.json").unlink()
        with raises(BundleError, "engine_plan.json"):
            read_engine_plan(bundle)


class TestWrongMachine:
    def test_without_tensorrt_it_ends_with_the_container_command(
        self, bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        with raises(WrongMachineError, "TensorRT") as caught:
            build_engine(bundle)
        command = str(caught.value).splitlines()[-1]
        assert command.startswith("docker build --target export")
        assert f"{bundle}:/bundle" in command
        assert command.endswith(" engine /bundle")

    def test_its_exit_status_is_2(self) -> None:
        assert WrongMachineError("").exit_status == 2

    def test_nothing_is_written(self, bundle: Path) -> None:
        before = _content(bundle)
        with raises(WrongMachineError, "9.3.0", "11.0"):
            _build(bundle, FakeTensorRT(version="9.3.0"))
        assert _content(bundle) == before

    @pytest.mark.parametrize("version", ["9.3.0", "10.16.1.11", "11.4.0.106"])
    def test_a_tensorrt_whose_plan_the_server_cannot_load_is_refused(
        self, bundle: Path, version: str
    ) -> None:
        with raises(WrongMachineError, version, "11.0"):
            _build(bundle, FakeTensorRT(version=version))

    def test_another_gpu_is_named_with_what_is_planned(
        self, bundle: Path, trt: FakeTensorRT
    ) -> None:
        with raises(WrongMachineError, "9.0", "8.0"):
            _build(bundle, trt, FakeGpu(compute_capability="9.0"))

    def test_another_gpu_is_told_before_a_missing_tensorrt(
        self, bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        with raises(WrongMachineError, "--compute-capability 9.0"):
            build_engine(bundle, gpu=FakeGpu(compute_capability="9.0"))

    def test_no_gpu_is_said_as_such(
        self, bundle: Path, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with raises(WrongMachineError, "CUDA"):
            build_engine(bundle, trt=trt)


def test_another_graph_than_planned_is_refused_on_any_machine(bundle: Path) -> None:
    _plan(bundle, onnx_sha256="0" * 64).write(bundle)
    with raises(BundleError, sha256_of(bundle / "model.onnx"), "0" * 64):
        build_engine(bundle)


def test_broken_tensorrt_libraries_are_the_machines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", broken)
    with raises(WrongMachineError, "libnvinfer"):
        load_tensorrt()


def test_images_of_another_size_are_refused(bundle: Path, trt: FakeTensorRT) -> None:
    with raises(SettingsError, "(1, 32, 32, 3) uint8", "(N, 64, 64, 3)"):
        _build(bundle, trt, tiles=_tiles(np.zeros((1, 32, 32, 3), np.uint8)))


class TestBuild:
    def test_network_and_configuration_are_the_plans(self, bundle: Path, trt: FakeTensorRT) -> None:
        _plan(bundle, workspace_bytes=123, builder_optimization_level=2).write(bundle)
        _build(bundle, trt)
        assert trt.network_flags == 1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
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
        assert "TensorRT 11.0, or export again with another --opset" in str(caught.value)
        assert "node_a: no such operator" in str(caught.value)
        assert "node_b: axes must be constant" in str(caught.value)

    def test_no_plan_is_a_failure(self, bundle: Path, trt: FakeTensorRT) -> None:
        trt.builds = False
        with raises(EngineError, "model.onnx"):
            _build(bundle, trt)

    def test_a_build_that_fails_leaves_the_bundle_as_it_was(
        self, bundle: Path, trt: FakeTensorRT
    ) -> None:
        before = _content(bundle)
        trt.builds = False
        with pytest.raises(EngineError):
            _build(bundle, trt)
        assert _content(bundle) == before

    @pytest.mark.parametrize(
        ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
    )
    def test_a_signal_stops_the_build_and_leaves_nothing(
        self, bundle: Path, trt: FakeTensorRT, number: int, raised: type[BaseException]
    ) -> None:
        before = _content(bundle)
        trt.signal = number
        earlier = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as the command does
        try:
            # As in the command. The build's thread receives the signal.
            with signals_wake_main_thread(), deaf_main_thread(number), pytest.raises(raised):
                _build(bundle, trt)
        finally:
            signal.signal(signal.SIGTERM, earlier)
        assert trt.stopped
        assert _content(bundle) == before
        assert not list(bundle.glob(".engine-*"))

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
        _build(bundle, trt)
        artefact = read_bundle(bundle).artefacts[-1]
        assert (bundle / artefact.file).is_file()
        assert artefact.file == "model.plan"
        assert (artefact.format, artefact.precision) == ("tensorrt_plan", "fp32")
        assert artefact.tensorrt is not None
        assert artefact.tensorrt.version == "11.0.0.114"
        assert artefact.tensorrt.compute_capability == "8.0"

    @pytest.mark.parametrize(
        ("release", "image"),
        [
            (None, None),
            ("26.06", "nvcr.io/nvidia/tensorrt:26.06-py3"),
            ("8.5.2", None),  # of NVIDIA's images for other machines
        ],
    )
    def test_the_manifest_names_a_container_only_where_it_was_built_in_one(
        self,
        bundle: Path,
        trt: FakeTensorRT,
        monkeypatch: pytest.MonkeyPatch,
        release: str | None,
        image: str | None,
    ) -> None:
        monkeypatch.delenv("NVIDIA_TENSORRT_VERSION", raising=False)
        if release is not None:
            monkeypatch.setenv("NVIDIA_TENSORRT_VERSION", release)
        _build(bundle, trt)
        build = read_bundle(bundle).artefacts[-1].tensorrt
        assert build is not None
        assert build.container_image == image

    def test_it_is_built_for_another_server_when_asked(self, bundle: Path) -> None:
        plan = read_engine_plan(bundle).for_server(
            tensorrt_version="10.16", compute_capability="9.0"
        )
        _build(bundle, FakeTensorRT("10.16.1.11"), FakeGpu(compute_capability="9.0"), plan)
        build = read_bundle(bundle).artefacts[-1].tensorrt
        assert build is not None
        assert (build.version, build.compute_capability) == ("10.16.1.11", "9.0")

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
        assert all(batch.parity.label_agreement == 1 for batch in report.batches)
        assert all(0 < b.latency.p50_ms <= b.latency.p99_ms for b in report.batches)

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
        with raises(EngineError, "labels", "HALF", "UINT8"):
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


def _changing(
    name: str, change: Callable[[np.ndarray], np.ndarray]
) -> Callable[[Outputs], Outputs]:
    return lambda outputs: outputs | {name: change(outputs[name].copy())}


def _rare_class() -> ValidationTiles:
    """Tiles of one class, with a spot of a rare one, and their masks."""
    labels = np.full((3, TILE_SIZE_PX, TILE_SIZE_PX), OTHER, np.uint8)
    labels[1, 8:16, 8:16] = NECROSIS
    images = REFERENCE_RGB[labels - 1].astype(np.uint8)
    return _tiles(images, labels)


class TestGate:
    @pytest.mark.parametrize("batch", [1, 4, 8])
    def test_wrong_labels_at_one_batch_size_fail(
        self, bundle: Path, trt: FakeTensorRT, batch: int
    ) -> None:
        trt.distort = lambda outputs: (
            outputs | {"labels": outputs["labels"] % 5 + 1}
            if len(outputs["labels"]) == batch
            else outputs
        )
        with raises(GateError, f"batch {batch}", "99.99%"):
            _build(bundle, trt)

    def test_with_masks_the_scores_are_against_them(self, bundle: Path, trt: FakeTensorRT) -> None:
        tiles = _rare_class()
        assert tiles.masks is not None
        tiles.masks[1, 16:24, 8:16] = NECROSIS  # twice what the model finds
        entry = _build(bundle, trt, tiles=tiles).batches[0].parity.classes[NECROSIS - 1]
        assert entry.recall == entry.torch_recall
        assert 0.3 < entry.recall < 0.6

    @pytest.mark.parametrize(("agreement", "passes"), [(0.9999, False), (0.99, True)])
    def test_its_tolerance_is_the_plans(
        self, bundle: Path, trt: FakeTensorRT, agreement: float, passes: bool
    ) -> None:
        _plan(bundle, tolerances=Tolerances(fp32_agreement=agreement)).write(bundle)
        trt.distort = _changing(
            "labels", lambda labels: np.where(np.indices(labels.shape)[1:].sum(0), labels, 1)
        )
        if passes:
            assert _build(bundle, trt).label_agreement < 1
        else:
            with raises(GateError, "99.99%", "ONNX Runtime"):
                _build(bundle, trt)

    def test_each_place_of_the_largest_batch_is_compared(
        self, bundle: Path, trt: FakeTensorRT
    ) -> None:
        def last_is_wrong(labels: np.ndarray) -> np.ndarray:
            labels[7:] = labels[7:] % 5 + 1
            return labels

        trt.distort = _changing("labels", last_is_wrong)
        with raises(GateError, "batch 8"):
            _build(bundle, trt)


class TestReport:
    def test_it_says_how_fast_each_batch_is_and_what_was_fused(
        self, bundle: Path, trt: FakeTensorRT
    ) -> None:
        lines = list(_build(bundle, trt).summary())
        assert "100.0000% of the pixels of 3 tiles" in lines[0]
        assert [line.partition(": p50 ")[0] for line in lines[1:4]] == [
            "batch 1",
            "batch 4",
            "batch 8",
        ]
        assert lines[4:] == ["fused attentions: 2 of 0"]

    @pytest.mark.parametrize(("fused", "warned"), [(0, True), (1, False)])
    def test_it_warns_where_no_attention_was_fused(
        self, bundle: Path, trt: FakeTensorRT, fused: int, warned: bool
    ) -> None:
        changes = {"num_attention": 24, "num_fused_attention": fused}
        report = _build(bundle, trt).model_copy(update=changes)
        assert any("fused no attention" in line for line in report.summary()) is warned

    def test_the_model_card_tells_of_the_last_build_alone(
        self, bundle: Path, trt: FakeTensorRT
    ) -> None:
        (bundle / "MODEL_CARD.md").write_text("# segmenter\n\n## Limits\n\nNone.\n")
        _build(bundle, trt)
        _build(bundle, trt)
        card = (bundle / "MODEL_CARD.md").read_text()
        assert card.startswith("# segmenter\n\n## Limits\n\nNone.\n\n## TensorRT engine\n")
        assert card.count("## TensorRT engine") == 1
        assert "TensorRT 11.0.0.114 on Fake A100 (compute capability 8.0)" in card
        assert card.count(" ms |") == 12


class TestMeasures:
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
