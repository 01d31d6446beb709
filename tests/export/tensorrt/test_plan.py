import json
from pathlib import Path

import pytest

from export.errors import BundleError, SettingsError
from export.gate.schema import Tolerances
from export.tensorrt.plan import ENGINE_PLAN_FILE, EnginePlan, plan_for, read_engine_plan
from serve.contract.manifest import Artefact, Manifest, TensorRTBuild, read_bundle
from tests.support.errors import raises


@pytest.fixture
def manifest(toy_bundle: Path) -> Manifest:
    return read_bundle(toy_bundle)


@pytest.fixture
def plan(manifest: Manifest) -> EnginePlan:
    return plan_for(manifest, manifest.artefacts[0])


def _in(precision: str, manifest: Manifest) -> Artefact:
    return manifest.artefacts[0].model_copy(update={"precision": precision})


def test_a_plan_is_of_its_graph_for_an_a100_in_nvidias_containers(
    plan: EnginePlan, manifest: Manifest
) -> None:
    artefact = manifest.artefacts[0]
    assert (plan.onnx_file, plan.onnx_sha256) == ("model.onnx", artefact.sha256)
    assert (plan.compute_capability, plan.hardware_compatibility_level) == ("8.0", "none")
    assert plan.tensorrt_version == "11.0"
    assert plan.container_image == "nvcr.io/nvidia/tensorrt:26.06-py3"
    assert plan.serving_image == "nvcr.io/nvidia/tritonserver:26.06-py3"


@pytest.mark.parametrize(("largest", "sizes"), [(8, (1, 4, 8)), (1, (1,))])
def test_the_profile_goes_from_one_tile_to_the_servers_largest_batch(
    manifest: Manifest, largest: int, sizes: tuple[int, ...]
) -> None:
    manifest = manifest.model_copy(update={"max_batch_size": largest})
    assert plan_for(manifest, manifest.artefacts[0]).batch.sizes == sizes


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("fp16", True)])
def test_a_float32_plan_does_not_round_to_tf32(
    manifest: Manifest, precision: str, allowed: bool
) -> None:
    assert plan_for(manifest, _in(precision, manifest)).allow_tf32 is allowed


def test_an_int8_graph_is_refused(manifest: Manifest) -> None:
    with raises(SettingsError, "int8", "fp32"):
        plan_for(manifest, _in("int8", manifest))


def test_the_gates_tolerances_are_those_of_the_export(manifest: Manifest, tmp_path: Path) -> None:
    tolerances = Tolerances(fp32_agreement=0.9)
    plan_for(manifest, manifest.artefacts[0], tolerances=tolerances).write(tmp_path)
    assert read_engine_plan(tmp_path).tolerances == tolerances


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"precision": "half"}, "precision is 'half'; expected 'fp32', 'fp16' or 'bf16'"),
        ({"workspace_bytes": 0}, "workspace_bytes is 0; expected more than 0"),
        ({"batch": 4}, "batch is 4; expected names with a value each"),
        ({"batch": {"opt": 9, "max": 8}}, "opt is 9, expected 1 to 8"),
        ({"colour": "red"}, "colour is unknown"),
        ({"tensorrt_version": "9.0"}, "the builder does not support TensorRT 9.0"),
    ],
)
def test_a_plan_file_that_is_wrong_is_refused_in_one_line(
    plan: EnginePlan, change: dict[str, object], problem: str, tmp_path: Path
) -> None:
    content = json.loads(plan.write(tmp_path).read_text()) | change
    (tmp_path / ENGINE_PLAN_FILE).write_text(json.dumps(content))
    with raises(BundleError, ENGINE_PLAN_FILE, problem, "Export the checkpoint again") as refused:
        read_engine_plan(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_bundle_without_a_plan_says_to_export_again(tmp_path: Path) -> None:
    with raises(BundleError, ENGINE_PLAN_FILE, "Export the checkpoint again"):
        read_engine_plan(tmp_path)


@pytest.mark.parametrize(
    ("version", "taken"),
    [("10.16.1.11", False), ("11.0.0.114", True), ("11.0.2", True), ("11.4.0.106", False)],
)
def test_only_the_tensorrt_of_the_image_that_serves_loads_a_plan(
    plan: EnginePlan, version: str, taken: bool
) -> None:
    assert plan.takes_version(version) is taken
    mismatch = plan.serving_mismatch(TensorRTBuild(version=version, compute_capability="8.0"))
    assert (mismatch is None) is taken
    assert taken or "tritonserver:26.06-py3 has 11.0" in str(mismatch)


def test_a_plan_of_another_gpu_is_told_whatever_its_version(plan: EnginePlan) -> None:
    for version in ("11.0.0.114", "10.16", "eleven"):
        mismatch = plan.serving_mismatch(TensorRTBuild(version=version, compute_capability="9.0"))
        assert "compute capability 9.0" in str(mismatch)
    odd = plan.serving_mismatch(TensorRTBuild(version="eleven", compute_capability="8.0"))
    assert "TensorRT eleven" in str(odd)


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
    plan: EnginePlan, change: dict[str, str]
) -> None:
    with raises(SettingsError, *change.values(), "major.minor, such as 8.0"):
        plan.for_server(**change)
