import fcntl
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import export.tensorrt.engine
from export.errors import BundleError, EngineError, GateError, GraphError, WrongMachineError
from export.gate.schema import Tolerances
from export.gate.tiles import ValidationTiles
from export.tensorrt.container import ContainerBuild
from export.tensorrt.engine import ENGINE_REPORT_FILE, build_engine
from export.tensorrt.plan import plan_for, read_engine_plan
from export.tensorrt.report import EngineReport
from export.tensorrt.requirements import load_tensorrt
from export.tensorrt.session import count_attention
from serve.contract.interrupts import safe_interrupts
from serve.contract.manifest import Manifest, TensorRTBuild, read_bundle, sha256_of
from tests.support.errors import raises
from tests.support.fake_tensorrt import FakeGpu, FakeTensorRT, Outputs
from tests.support.interrupts import deaf_main_thread
from tests.support.meanwhile import before_call
from tests.support.toy_bundle import REFERENCE_RGB, TILE_SIZE_PX, replace_bundle

NECROSIS, OTHER = 4, 5


def _tiles(images: np.ndarray, masks: np.ndarray | None = None) -> ValidationTiles:
    names = tuple(f"tile_{index}" for index in range(len(images)))
    return ValidationTiles(source="3 tiles", names=names, images=images, masks=masks)


TILES = _tiles(
    np.random.default_rng(0).integers(0, 256, (3, TILE_SIZE_PX, TILE_SIZE_PX, 3), np.uint8)
)


@dataclass
class Workshop:
    """A bundle with a plan, and a machine with a GPU and TensorRT, which a test may change."""

    bundle: Path
    trt: FakeTensorRT | None = field(default_factory=FakeTensorRT)
    gpu: FakeGpu | None = field(default_factory=FakeGpu)
    server: dict[str, str] = field(default_factory=dict)
    """What differs from the planned server."""

    def plan(self, **changes: object) -> None:
        """Change the plan."""
        read_engine_plan(self.bundle).model_copy(update=changes).write(self.bundle)

    def build(self, tiles: ValidationTiles = TILES) -> EngineReport:
        """Build the engine; returns the report that it left in the bundle."""
        plan = read_engine_plan(self.bundle).for_server(**self.server)
        container = ContainerBuild(plan, self.bundle, data=None)
        report = build_engine(self.bundle, plan, tiles, container, trt=self.trt, gpu=self.gpu)
        kept = EngineReport.model_validate_json((self.bundle / ENGINE_REPORT_FILE).read_text())
        assert kept == report
        return report

    def built(self) -> TensorRTBuild:
        """What the manifest says of the plan that was built."""
        build = read_bundle(self.bundle).artefacts[-1].tensorrt
        assert build is not None
        return build

    def files(self) -> dict[str, bytes]:
        """All files of the bundle."""
        return {
            str(path.relative_to(self.bundle)): path.read_bytes()
            for path in self.bundle.rglob("*")
            if path.is_file()
        }


@pytest.fixture
def shop(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    monkeypatch.setattr("export.tensorrt.session.WARM_UP_RUNS", 1)
    monkeypatch.setattr("export.tensorrt.session.MEASURED_RUNS", 3)
    bundle = Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))
    manifest = read_bundle(bundle)
    plan_for(manifest, manifest.artefacts[0]).write(bundle)
    return Workshop(bundle)


# The machine


def test_without_tensorrt_it_ends_with_the_container_command(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    shop.trt = None
    with raises(WrongMachineError, "TensorRT") as caught:
        shop.build()
    command = str(caught.value).splitlines()[-1]
    assert command.startswith("docker build --target export")
    assert f"{shop.bundle}:/bundle" in command
    assert command.endswith(" engine /bundle")


@pytest.mark.parametrize("version", ["9.3.0", "10.16.1.11", "11.4.0.106"])
def test_a_tensorrt_whose_plan_the_server_cannot_load_is_refused_and_nothing_is_written(
    shop: Workshop, version: str
) -> None:
    before = shop.files()
    shop.trt = FakeTensorRT(version=version)
    with raises(WrongMachineError, version, "11.0"):
        shop.build()
    assert shop.files() == before


def test_another_gpu_is_told_before_a_missing_tensorrt(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    shop.trt, shop.gpu = None, FakeGpu(compute_capability="9.0")
    with raises(WrongMachineError, "--compute-capability 9.0", "expected 8.0"):
        shop.build()


def test_no_gpu_is_said_as_such(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    shop.gpu = None
    with raises(WrongMachineError, "CUDA"):
        shop.build()


def test_broken_tensorrt_libraries_are_the_machines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", broken)
    with raises(WrongMachineError, "libnvinfer"):
        load_tensorrt()


def test_another_graph_than_planned_is_refused_on_any_machine(shop: Workshop) -> None:
    shop.trt = shop.gpu = None
    shop.plan(onnx_sha256="0" * 64)
    with raises(BundleError, sha256_of(shop.bundle / "model.onnx"), "0" * 64):
        shop.build()


def test_a_graph_that_tensorrt_refuses_is_refused_before_it_is_looked_for(shop: Workshop) -> None:
    shop.trt = shop.gpu = None
    shop.plan(obstacles=("Softmax_1: operator Softmax is not in the list",))
    with raises(GraphError, "model.onnx", "Softmax_1: operator Softmax"):
        shop.build()


# The build


def test_network_configuration_and_profile_are_the_plans(shop: Workshop) -> None:
    shop.plan(workspace_bytes=123, builder_optimization_level=2)
    shop.build()
    trt = shop.trt
    assert trt is not None
    assert trt.network_flags == 1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    config = trt.config
    assert config is not None
    assert config.pools == {trt.MemoryPoolType.WORKSPACE: 123}
    assert config.builder_optimization_level == 2
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    assert config.flags == {trt.BuilderFlag.TF32: False}
    assert config.profiles == [{"image": ((1, 64, 64, 3), (4, 64, 64, 3), (8, 64, 64, 3))}]


def test_every_error_of_the_parser_is_listed_with_its_node(shop: Workshop) -> None:
    shop.trt = FakeTensorRT()
    shop.trt.parser_errors = [("node_a", "no such operator"), ("node_b", "axes must be constant")]
    named = ("TensorRT 11.0, or export again with another --opset", "node_a: no such operator")
    with raises(EngineError, *named, "node_b: axes must be constant"):
        shop.build()


def test_a_build_that_fails_leaves_the_bundle_as_it_was(shop: Workshop) -> None:
    before = shop.files()
    shop.trt = FakeTensorRT()
    shop.trt.builds = False
    with raises(EngineError, "model.onnx"):
        shop.build()
    assert shop.files() == before


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_stops_the_build_and_leaves_nothing(
    shop: Workshop, number: int, raised: type[BaseException]
) -> None:
    before = shop.files()
    trt = shop.trt = FakeTensorRT()
    trt.signal = number
    earlier = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as the command does
    try:
        # As in the command. The build's thread receives the signal.
        with safe_interrupts(), deaf_main_thread(number), pytest.raises(raised):
            shop.build()
    finally:
        signal.signal(signal.SIGTERM, earlier)
    assert trt.stopped
    assert shop.files() == before
    assert not list(shop.bundle.glob(".engine-*"))


def test_an_export_waits_while_an_engine_is_put_into_its_bundle(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def ask() -> None:
        handle = os.open(shop.bundle.parent, os.O_RDONLY)  # which an export locks
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)
        asked.append(True)

    before_call(monkeypatch, export.tensorrt.engine, "read_bundle", ask, at=1)
    before_call(monkeypatch, export.tensorrt.engine, "_install", ask)
    shop.build()
    assert asked == [True, True]


def test_a_bundle_that_is_replaced_during_the_build_does_not_get_the_engine(
    shop: Workshop,
) -> None:
    trt = shop.trt = FakeTensorRT()
    versions = iter("2")

    def replace_meanwhile(outputs: Outputs) -> Outputs:
        for version in versions:
            replace_bundle(shop.bundle, version)
        return outputs

    trt.distort = replace_meanwhile
    with raises(BundleError, shop.bundle, "was replaced while its engine was built"):
        shop.build()
    assert set(shop.files()) == {"manifest.json", "model.onnx"}


def test_the_timing_cache_is_kept_for_the_next_build_on_this_gpu(shop: Workshop) -> None:
    (shop.bundle / "timing.cache").write_bytes(b"other gpu")
    shop.build()
    assert (shop.bundle / "timing.cache").read_bytes() == b"+"
    shop.build()
    assert (shop.bundle / "timing.cache").read_bytes() == b"++"


# What is kept, and what is measured


def test_a_plan_that_passes_is_in_the_manifest_and_the_next_one_takes_its_place(
    shop: Workshop,
) -> None:
    for _ in range(2):
        shop.build()
    artefacts = read_bundle(shop.bundle).artefacts
    assert [a.file for a in artefacts] == ["model.onnx", "model.plan"]
    assert (shop.bundle / "model.plan").is_file()
    assert (artefacts[-1].format, artefacts[-1].precision) == ("tensorrt_plan", "fp32")
    assert (shop.built().version, shop.built().compute_capability) == ("11.0.0.114", "8.0")


@pytest.mark.parametrize(
    ("release", "image"),
    [
        (None, None),
        ("26.06", "nvcr.io/nvidia/tensorrt:26.06-py3"),
        ("8.5.2", None),  # of NVIDIA's images for other machines
    ],
)
def test_the_manifest_names_a_container_only_where_it_was_built_in_one(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, release: str | None, image: str | None
) -> None:
    monkeypatch.delenv("NVIDIA_TENSORRT_VERSION", raising=False)
    if release is not None:
        monkeypatch.setenv("NVIDIA_TENSORRT_VERSION", release)
    shop.build()
    assert shop.built().container_image == image


def test_it_is_built_for_another_server_when_asked(shop: Workshop) -> None:
    shop.server = {"tensorrt_version": "10.16", "compute_capability": "9.0"}
    shop.trt, shop.gpu = FakeTensorRT("10.16.1.11"), FakeGpu(compute_capability="9.0")
    shop.build()
    assert (shop.built().version, shop.built().compute_capability) == ("10.16.1.11", "9.0")


def test_it_is_measured_at_each_batch_of_the_profile_and_the_summary_says_so(
    shop: Workshop,
) -> None:
    report = shop.build()
    assert [batch.batch_size for batch in report.batches] == [1, 4, 8]
    assert all(batch.parity.label_agreement == 1 for batch in report.batches)
    assert all(0 < b.latency.p50_ms <= b.latency.p99_ms for b in report.batches)
    lines = list(report.summary())
    assert "100.0000% of the pixels of 3 tiles" in lines[0]
    names = [line.partition(": p50 ")[0] for line in lines[1:4]]
    assert names == ["batch 1", "batch 4", "batch 8"]
    assert lines[4:] == ["fused attentions: 2 of 0"]


def test_fused_attention_is_counted_by_the_kernels_name_alone(shop: Workshop) -> None:
    shop.trt = FakeTensorRT()
    shop.trt.layers = ["_gemm_mha_v2_myl0_1", "fmha_v2_flash", "node_MatMul", "kgen_alphamhabeta"]
    assert shop.build().num_fused_attention == 2


@pytest.mark.parametrize(("fused", "warned"), [(0, True), (1, False)])
def test_the_summary_warns_where_no_attention_was_fused(
    shop: Workshop, fused: int, warned: bool
) -> None:
    changes = {"num_attention": 24, "num_fused_attention": fused}
    report = shop.build().model_copy(update=changes)
    assert any("fused no attention" in line for line in report.summary()) is warned


def test_an_output_of_another_type_is_refused(shop: Workshop) -> None:
    shop.trt = FakeTensorRT()
    shop.trt.output_type = shop.trt.DataType.HALF
    with raises(EngineError, "labels", "HALF", "UINT8"):
        shop.build()


def test_the_float32_graph_is_the_reference_of_a_half_precision_plan(shop: Workshop) -> None:
    manifest = read_bundle(shop.bundle)
    fp32 = manifest.artefacts[0]
    shutil.copy(shop.bundle / "model.onnx", shop.bundle / "model.fp16.onnx")
    fp16 = fp32.model_copy(update={"file": "model.fp16.onnx", "precision": "fp16"})
    changed: Manifest = manifest.model_copy(update={"artefacts": (fp16, fp32)})
    changed.write(shop.bundle)
    plan_for(changed, fp16).write(shop.bundle)
    assert shop.build().reference_file == "model.onnx"
    assert read_bundle(shop.bundle).artefacts[-1].precision == "fp16"


def test_the_model_card_tells_of_the_last_build_alone(shop: Workshop) -> None:
    (shop.bundle / "MODEL_CARD.md").write_text("# segmenter\n\n## Limits\n\nNone.\n")
    for _ in range(2):
        shop.build()
    card = (shop.bundle / "MODEL_CARD.md").read_text()
    assert card.startswith("# segmenter\n\n## Limits\n\nNone.\n\n## TensorRT engine\n")
    assert card.count("## TensorRT engine") == 1
    assert "TensorRT 11.0.0.114 on Fake A100 (compute capability 8.0)" in card
    assert card.count(" ms |") == 12


# The gate


def _relabelling(wrong: Callable[[np.ndarray], object]) -> FakeTensorRT:
    """TensorRT whose plans give other labels where `wrong` tells, of (B, H, W) labels."""

    def distort(outputs: Outputs) -> Outputs:
        labels = outputs["labels"]
        return outputs | {"labels": np.where(wrong(labels), labels % 5 + 1, labels)}

    trt = FakeTensorRT()
    trt.distort = distort
    return trt


@pytest.mark.parametrize("batch", [1, 4, 8])
def test_wrong_labels_at_one_batch_size_fail_and_leave_no_plan(shop: Workshop, batch: int) -> None:
    before = shop.files()
    shop.trt = _relabelling(lambda labels: len(labels) == batch)
    with raises(GateError, f"batch {batch}", "99.99%"):
        shop.build()
    (shop.bundle / "timing.cache").unlink()  # complete, and of use to the next build
    assert shop.files() == before
    assert not list(shop.bundle.glob(".engine-*"))


def test_each_place_of_the_largest_batch_is_compared(shop: Workshop) -> None:
    shop.trt = _relabelling(lambda labels: np.arange(len(labels))[:, None, None] >= 7)
    with raises(GateError, "batch 8"):
        shop.build()


@pytest.mark.parametrize(("agreement", "passes"), [(0.9999, False), (0.99, True)])
def test_the_gates_tolerance_is_the_plans(shop: Workshop, agreement: float, passes: bool) -> None:
    shop.plan(tolerances=Tolerances(fp32_agreement=agreement))
    shop.trt = _relabelling(lambda labels: np.indices(labels.shape)[1:].sum(0) == 0)
    if passes:
        assert shop.build().label_agreement < 1
    else:
        with raises(GateError, "99.99%", "ONNX Runtime"):
            shop.build()


@pytest.mark.parametrize(("most", "passes"), [(2, False), (3, True)])
def test_no_confidence_differs_by_more_than_the_plan_allows(
    shop: Workshop, most: int, passes: bool
) -> None:
    def distort(outputs: Outputs) -> Outputs:
        confidence = outputs["confidence"].copy()
        confidence[:, 0, 0] = confidence[:, 0, 0] - 3  # 51 is the least of 5 classes
        return outputs | {"confidence": confidence}

    shop.plan(max_byte_difference=most)
    assert shop.trt is not None
    shop.trt.distort = distort
    if passes:
        shop.build()
    else:
        with raises(GateError, "differs by 3 of 255", "at most 2"):
            shop.build()


def test_with_masks_the_scores_are_against_them(shop: Workshop) -> None:
    """Tiles of one class with a spot of a rare one, of which the masks have twice as much."""
    labels = np.full((3, TILE_SIZE_PX, TILE_SIZE_PX), OTHER, np.uint8)
    labels[1, 8:16, 8:16] = NECROSIS
    images = REFERENCE_RGB[labels - 1].astype(np.uint8)
    labels[1, 16:24, 8:16] = NECROSIS
    report = shop.build(_tiles(images, labels))
    assert report.has_masks
    entry = report.batches[0].parity.classes[NECROSIS - 1]
    assert entry.recall == entry.torch_recall
    assert 0.3 < entry.recall < 0.6


# Attentions in a graph


@pytest.mark.parametrize("cast", [False, True])
def test_a_softmax_into_a_product_is_an_attention_also_with_a_cast_between_them(
    cast: bool, tmp_path: Path
) -> None:
    node = helper.make_node
    weights = "narrow" if cast else "weights"
    nodes = [node("Softmax", ["x"], ["weights"]), node("MatMul", [weights, "x"], ["y"])]
    if cast:
        nodes.insert(1, node("Cast", ["weights"], ["narrow"], to=TensorProto.FLOAT))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4]) for name in "xy")
    graph = helper.make_graph(nodes, "attention", [x], [y])
    onnx.save(helper.make_model(graph), tmp_path / "a.onnx")
    assert count_attention(tmp_path / "a.onnx") == 1


def test_a_softmax_over_classes_is_no_attention(toy_bundle: Path) -> None:
    assert count_attention(toy_bundle / "model.onnx") == 0
