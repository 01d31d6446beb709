"""OpenVINO in tests, which skip with the reason where it does not run."""

import pytest

from serve.contract import openvino
from serve.contract.openvino import GraphPrecision


def needs_openvino(precision: GraphPrecision = "fp32") -> None:
    """Skip the test where OpenVINO is not installed, or does not compute in this precision."""
    found = openvino.problem(precision)
    if found is not None:
        pytest.skip(found)


def forget_openvino() -> None:
    """Have OpenVINO looked for again."""
    openvino._core.cache_clear()
    openvino.problem.cache_clear()
