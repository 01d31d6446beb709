import json
from pathlib import Path

import pytest

from export.errors import BundleError, SettingsError
from export.tensorrt.plan import ENGINE_PLAN_FILE, EnginePlan, plan_for, read_engine_plan
from serve.contract.manifest import read_bundle
from tests.support.errors import raises


@pytest.fixture
def plan(toy_bundle: Path) -> EnginePlan:
    manifest = read_bundle(toy_bundle)
    return plan_for(manifest, manifest.artefacts[0])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"precision": "half"}, "precision is 'half'; expected 'fp32', 'fp16' or 'bf16'"),
        ({"workspace_bytes": 0}, "workspace_bytes is 0; expected more than 0"),
        ({"batch": 4}, "batch is 4; expected names with a value each"),
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


def test_versions_for_another_server_are_told_with_their_form(plan: EnginePlan) -> None:
    with raises(SettingsError, "compute_capability is 'A100'", "such as 8.0"):
        plan.for_server(compute_capability="A100")
