"""OpenVINO in tests, which skip with the reason where it does not run."""

import pytest

from serve.contract import openvino
from serve.contract.machine import this_processor
from serve.contract.manifest import Manifest, Proof
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


def passed_in_openvino(manifest: Manifest) -> Manifest:
    """The manifest of a bundle that has passed the gate in OpenVINO."""
    artefact = manifest.artefacts[0]
    proof = Proof(
        provider="openvino",
        processor=this_processor().kind,
        runtime="OpenVINO",
        parity=artefact.parity,
    )
    artefacts = (artefact.model_copy(update={"proofs": (*artefact.proofs, proof)}),)
    return manifest.model_copy(update={"artefacts": artefacts})
