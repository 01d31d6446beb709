"""The entries of a bundle's manifest: its artefacts, who can run them, and the warm-up sample."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from export.gate.schema import ArtefactParity, Tolerances
from export.gate.tiles import Images
from export.graph.nodes import ModelGraph
from export.settings import BundleSettings
from serve.contract import openvino
from serve.contract.certificate import ScaleCertificate
from serve.contract.machine import this_processor
from serve.contract.manifest import (
    Artefact,
    Manifest,
    Proof,
    TissueClass,
    WarmUp,
    interface,
    sha256_of,
)
from train.model.checkpoint import CheckpointCard

MODEL_FILE = "model.onnx"
WARM_UP_FILE = "warm_up.npz"
MIN_WARM_UP_AGREEMENT = 0.98
"""Share of labels that a server must reproduce. Other hardware and precisions round differently."""
_DIGITS_OF_VERSION = 12
_VERSIONS: dict[str, Callable[[], str]] = {
    "ONNX Runtime": lambda: onnxruntime.__version__,
    "OpenVINO": openvino.version,
}
"""Versions of the runtimes, by the names that the gate gives them."""


def artefacts_of(
    judged: Sequence[ArtefactParity], folder: Path, tolerances: Tolerances
) -> tuple[Artefact, ...]:
    """List what passed the gate, each file once.

    Args:
        judged: the gate's verdicts.
        folder: the bundle's.
        tolerances: what the gate allowed.
    """
    passed: dict[str, ArtefactParity] = {}
    for found in judged:
        if found.passed:
            passed.setdefault(found.file, found)
    return tuple(
        Artefact(
            file=found.file,
            format="onnx",
            precision=found.precision,
            sha256=sha256_of(folder / found.file),
            parity=found.for_manifest(),
            min_agreement=tolerances.limits(found.precision).agreement,
            proofs=tuple(_proofs(judged, found.file)),
        )
        for found in passed.values()
    )


def _proofs(judged: Sequence[ArtefactParity], file: str) -> Iterator[Proof]:
    """The runtimes that passed with a file on this machine's processor."""
    for found in judged:
        if found.passed and found.file == file and found.measured_with != "emulation":
            yield Proof(
                provider="openvino" if found.measured_with == "OpenVINO" else "cpu",
                processor=this_processor().kind,
                runtime=f"{found.measured_with} {_VERSIONS[found.measured_with]()}",
                parity=found.for_manifest(),
            )


def build_manifest(
    settings: BundleSettings,
    card: CheckpointCard,
    artefacts: tuple[Artefact, ...],
    folder: Path,
    *,
    warm_up: WarmUp,
    certificate: ScaleCertificate | None,
) -> Manifest:
    """Build the manifest of a bundle.

    Args:
        settings: of the export.
        card: what the checkpoint is, with the checksum of its weights.
        artefacts: that are in the bundle.
        folder: the bundle's, which has the float32 graph.
        warm_up: the sample that a server compares itself with.
        certificate: what images of another um per pixel cost; None where it was not measured.
    """
    checkpoint_sha256 = card.weights_sha256
    assert checkpoint_sha256 is not None, "a card that was loaded with its weights has it"
    tile_size_px = card.settings.model.input_px
    inputs, outputs = interface(tile_size_px, len(card.classes))
    return Manifest(
        name=settings.name,
        version=settings.model_version or checkpoint_sha256[:_DIGITS_OF_VERSION],
        classes=tuple(TissueClass(name=c.name, color=c.color.lower()) for c in card.classes),
        mpp=card.input_mpp,
        tile_size_px=tile_size_px,
        max_batch_size=settings.max_batch_size,
        opset=int(ModelGraph(onnx.load(str(folder / MODEL_FILE))).opset),
        inputs=inputs,
        outputs=outputs,
        class_attention_bias=card.class_attention_bias,
        predicts_iou=card.iou_head_trained,
        label_note=card.label_note,
        checkpoint_sha256=checkpoint_sha256,
        artefacts=artefacts,
        warm_up=warm_up,
        scale_certificate=certificate,
    )


def write_warm_up(folder: Path, images: Images) -> WarmUp:
    """Write the first of `images` with its labels, for a server to compare with its own."""
    session = onnxruntime.InferenceSession(folder / MODEL_FILE, providers=["CPUExecutionProvider"])
    (labels,) = session.run(["labels"], {"image": images})
    np.savez_compressed(folder / WARM_UP_FILE, image=images[0], labels=labels[0])
    return WarmUp(
        file=WARM_UP_FILE,
        sha256=sha256_of(folder / WARM_UP_FILE),
        min_agreement=MIN_WARM_UP_AGREEMENT,
    )
