"""Turns an ONNX graph into a TensorRT plan, as specified in `engine_plan.json`.

Checks the machine, builds the plan and runs it. Keeps the plan only if it passes the gate.
"""

from pathlib import Path
from types import ModuleType

import numpy as np

from export.destination import resolved
from export.errors import BundleError, GateError, WrongMachineError, errors_translated
from export.files import one_at_a_time, staging_folder, uninterrupted
from export.gate.answers import onnx_answers
from export.gate.gate import Gate
from export.gate.model_card import MODEL_CARD_FILE
from export.gate.tiles import ValidationTiles
from export.tensorrt.build import build_plan
from export.tensorrt.container import ContainerBuild, container_image
from export.tensorrt.plan import EnginePlan
from export.tensorrt.report import CARD_HEADING, BatchReport, EngineReport
from export.tensorrt.requirements import (
    check_capability,
    check_obstacles,
    check_source,
    check_version,
    load_tensorrt,
    pointing_to,
)
from export.tensorrt.session import (
    Gpu,
    PlanSession,
    count_attention,
    count_fused_attention,
    measure_latency,
)
from serve.contract.manifest import (
    MANIFEST_FILE,
    Artefact,
    Manifest,
    Parity,
    TensorRTBuild,
    read_bundle,
    sha256_of,
)

ENGINE_REPORT_FILE = "engine_report.json"


@errors_translated()
def build_engine(
    bundle: Path,
    plan: EnginePlan,
    tiles: ValidationTiles,
    container: ContainerBuild,
    *,
    trt: ModuleType | None = None,
    gpu: Gpu | None = None,
) -> EngineReport:
    """Build the bundle's TensorRT plan, run the gate on it, and add it to the manifest.

    The plan appears under its name only after it passes the gate.

    Args:
        bundle: the bundle's folder.
        plan: what to build.
        tiles: tiles of the model's size to compare on.
        container: commands to show if this machine cannot build.
        trt: the `tensorrt` module; imported by default.
        gpu: the GPU to build on; the current CUDA device by default.

    Returns:
        The measurements.

    Raises:
        GraphError: TensorRT cannot read the graph; `engine_plan.json` says why.
        BundleError: the bundle is damaged, its ONNX file is not the planned one, or another
            bundle took its place meanwhile.
        WrongMachineError: TensorRT or the GPU is missing, or not the planned one.
        EngineError: TensorRT cannot read, build or run the model.
        GateError: the plan fails the gate.
    """
    manifest = read_bundle(bundle)
    check_source(bundle, manifest, plan)
    check_obstacles(plan)
    with pointing_to(container, plan):
        gpu = gpu or Gpu.find()
        if gpu is not None:
            check_capability(gpu.name, gpu.compute_capability, plan)
        trt = trt or load_tensorrt()
        check_version(trt, plan)
        if gpu is None:
            raise WrongMachineError("This machine has no CUDA device that torch can use.")
    with staging_folder(bundle, ".engine-") as staging:
        serialized = build_plan(trt, plan, bundle)
        report = check_plan(trt, gpu, serialized, bundle, manifest, plan, tiles)
        # As the export that replaces a bundle, see `replaced_whole`.
        with one_at_a_time(resolved(bundle).parent):
            if read_bundle(bundle) != manifest:
                raise BundleError(
                    f"{bundle} was replaced while its engine was built; the new bundle has none. "
                    "Build it again."
                )
            (staging / plan.plan_file).write_bytes(serialized)
            _install(bundle, staging, manifest, plan, report)
    return report


def check_plan(
    trt: ModuleType,
    gpu: Gpu,
    serialized: bytes,
    bundle: Path,
    manifest: Manifest,
    plan: EnginePlan,
    tiles: ValidationTiles,
) -> EngineReport:
    """Run the plan at each batch size of its profile; compare and time it.

    Raises:
        EngineError: the plan does not run, or its inputs or outputs differ from the manifest's.
        GateError: the plan fails the gate.
    """
    reference = _reference_file(manifest, plan)
    filled = _fill(tiles, plan.batch.max)
    gate = Gate(
        tiles=filled,
        expected=onnx_answers(bundle / reference, filled.images),
        class_names=tuple(entry.name for entry in manifest.classes),
        tolerances=plan.tolerances,
        max_byte_difference=plan.max_byte_difference,
        reference="ONNX Runtime",
    )
    logger = trt.Logger(trt.Logger.WARNING)
    session = PlanSession(trt, gpu, serialized, logger, manifest.inputs, manifest.outputs)
    session.check_interface(plan)
    return EngineReport(
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        tensorrt_version=trt.__version__,
        container_image=container_image(),
        plan_bytes=len(serialized),
        reference_file=reference,
        tiles=tiles.source,
        num_tiles=len(tiles),
        has_masks=tiles.masks is not None,
        num_layers=session.engine.num_layers,
        num_attention=count_attention(bundle / plan.onnx_file),
        num_fused_attention=count_fused_attention(trt, session.engine),
        batches=tuple(_check_batch(session, gpu, gate, plan, size) for size in plan.batch.sizes),
    )


def _check_batch(
    session: PlanSession, gpu: Gpu, gate: Gate, plan: EnginePlan, size: int
) -> BatchReport:
    session.set_batch(size)
    answers = session.answer(gate.tiles.images)
    parity = gate.judge(answers, plan.plan_file, plan.precision, measured_with="TensorRT")
    if not parity.passed:
        raise GateError(
            f"{plan.plan_file} failed the gate at batch {size} and was deleted: "
            f"{'; '.join(parity.failures)}. Export again with --no-fp16, or with "
            "--fp32-islands and the blocks with the largest activations in parity_report.md."
        )
    return BatchReport(
        batch_size=size,
        parity=parity,
        latency=measure_latency(gpu, session.enqueue),
        cuda_graph_latency=measure_latency(gpu, gpu.capture(session.enqueue)),
    )


def _fill(tiles: ValidationTiles, largest_batch: int) -> ValidationTiles:
    """Repeat tiles to fill the largest batch, so that each position in it is compared."""
    order = np.arange(max(len(tiles), largest_batch)) % len(tiles)
    return ValidationTiles(
        source=tiles.source,
        names=tuple(tiles.names[index] for index in order),
        images=tiles.images[order],
        masks=None if tiles.masks is None else tiles.masks[order],
    )


def _reference_file(manifest: Manifest, plan: EnginePlan) -> str:
    """The bundle's float32 graph, which is closest to torch, else the plan's own graph."""
    for artefact in manifest.artefacts:
        if artefact.format == "onnx" and artefact.precision == "fp32":
            return artefact.file
    return plan.onnx_file


def _install(
    bundle: Path,
    staging: Path,
    manifest: Manifest,
    plan: EnginePlan,
    report: EngineReport,
) -> None:
    """Move the plan, its report and the new manifest into the bundle, each file atomically."""
    staged = staging / plan.plan_file
    artefact = Artefact.model_validate(
        {
            "file": plan.plan_file,
            "format": "tensorrt_plan",
            "precision": plan.precision,
            "sha256": sha256_of(staged),
            "parity": Parity(
                num_tiles=report.num_tiles,
                label_agreement=report.label_agreement,
            ),
            "tensorrt": TensorRTBuild(
                version=report.tensorrt_version,
                compute_capability=report.compute_capability,
                container_image=report.container_image,
            ),
        }
    )
    others = tuple(a for a in manifest.artefacts if a.file != plan.plan_file)
    manifest.model_copy(update={"artefacts": (*others, artefact)}).write(staging)
    (staging / ENGINE_REPORT_FILE).write_text(report.model_dump_json(indent=2) + "\n", "utf-8")
    names = [plan.plan_file, ENGINE_REPORT_FILE, MANIFEST_FILE]
    if (bundle / MODEL_CARD_FILE).is_file():
        # An earlier build's section is the last one; replace it.
        card, _, _ = (bundle / MODEL_CARD_FILE).read_text("utf-8").partition(f"\n{CARD_HEADING}\n")
        section = "\n\n".join(report.card())
        (staging / MODEL_CARD_FILE).write_text(f"{card}\n{section}\n", "utf-8")
        names.insert(0, MODEL_CARD_FILE)
    with uninterrupted(f"{plan.plan_file} is in the bundle already"):
        for name in names:
            (staging / name).replace(bundle / name)
