"""What `export` uses of TensorRT is there, in the real bindings of 10.16 and of 11.4."""

import ast
import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.errors import raises
from tests.support.tensorrt_bindings import PACKAGES, BindingsError, compile_stubs, install_bindings

pytestmark = [pytest.mark.tensorrt, pytest.mark.slow]

SOURCES = tuple((ROOT / "export" / "tensorrt").glob("*.py"))
TIMEOUT_S = 120


@dataclass(frozen=True)
class Contract:
    """What came of running the builder's code against one version of the bindings."""

    version: str
    touched: frozenset[str]
    outcomes: dict[str, str]


@pytest.fixture(scope="session", params=PACKAGES)
def contract(
    request: pytest.FixtureRequest, toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Contract:
    try:
        return _contract(request.param, toy_bundle, tmp_path_factory.mktemp("stubs"))
    except BindingsError as error:
        failure = str(error)
    pytest.fail(failure, pytrace=False)


def _contract(version: str, bundle: Path, scratch: Path) -> Contract:
    bindings = install_bindings(version)
    stubs = compile_stubs(version, scratch / version)
    path = os.pathsep.join([str(bindings), str(ROOT)])
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.tensorrt_contract", str(bundle)],
        env=os.environ | {"PYTHONPATH": path, "LD_LIBRARY_PATH": str(stubs)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    return Contract(found["version"], frozenset(found["touched"]), found["outcomes"])


@functools.cache
def _names_in_source() -> frozenset[str]:
    """Each `X` of a `trt.X` in the sources, and each `X.Y` of a `trt.X.Y`."""
    names = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            parts = ast.unparse(node).split(".") if isinstance(node, ast.Attribute) else []
            if len(parts) == 2 and parts[0] == "trt":
                names.add(parts[1])
    return frozenset(names - {"__version__"})


def test_the_bindings_are_of_the_version_that_is_asked_for(contract: Contract) -> None:
    assert contract.version.startswith(tuple(f"{version}." for version in PACKAGES))


@pytest.mark.parametrize(
    "scenario",
    [
        "build",
        "report_parser_errors",
        "run",
        "inspect_layers",
        "watch_progress",
        "read_every_compatibility_level",
    ],
)
def test_the_code_keeps_to_the_bindings(contract: Contract, scenario: str) -> None:
    assert contract.outcomes[scenario] == "ok"


def test_no_name_of_tensorrt_in_the_source_is_left_unchecked(contract: Contract) -> None:
    assert len(_names_in_source()) > 10
    assert _names_in_source() - {"IProgressMonitor"} <= contract.touched


@pytest.mark.parametrize(
    "member",
    [
        "Builder.build_serialized_network",
        "IBuilderConfig.progress_monitor",
        "IBuilderConfig.set_flag",
        "IBuilderConfig.clear_flag",
        "ICudaEngine.get_tensor_profile_shape",
        "IExecutionContext.execute_async_v3",
        "EngineInspector.get_layer_information",
        "ParserError.desc",
    ],
)
def test_the_scenarios_reach_what_a_build_needs(contract: Contract, member: str) -> None:
    assert member in contract.touched


def test_a_flag_that_11_removed_is_noticed(contract: Contract) -> None:
    outcome = contract.outcomes["use_what_version_11_removed"]
    if contract.version.startswith("10."):
        assert outcome == "ok"
    else:
        assert "AttributeError" in outcome


@pytest.mark.parametrize("scenario", ["call_with_a_wrong_type", "set_a_wrong_type"])
def test_a_wrong_type_is_noticed(contract: Contract, scenario: str) -> None:
    assert "fits no signature" in contract.outcomes[scenario]


def test_a_registry_that_cannot_be_reached_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOCALPATH_TENSORRT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with raises(BindingsError, "FOCALPATH_TENSORRT_CACHE"):
        install_bindings("11.4")
    assert not list(tmp_path.glob("bindings-*"))
