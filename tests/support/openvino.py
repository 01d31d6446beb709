"""OpenVINO in tests, which skip with the reason where it does not run."""

from functools import cache

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


def forget_openvino(patch: pytest.MonkeyPatch) -> None:
    """Have OpenVINO looked for again, until the patch is undone.

    The core that is in use stays: OpenVINO gives the thread that opens a core a stack for signals,
    which a second core that is closed after the first leaves unmapped. The next signal, a child's
    end for one, would then kill the process.
    """
    for function in (openvino._one_core, openvino.problem):
        patch.setattr(openvino, function.__name__, cache(function.__wrapped__))


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
