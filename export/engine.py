"""From an ONNX graph to a TensorRT plan, by `engine_plan.json` alone.

Checks first, then builds, runs what was built, and keeps it only if it passes the gate.
"""

import contextlib
import importlib
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from export.engine_builder import build_plan
from export.engine_check import (
    Answers,
    EngineReport,
    Gpu,
    PlanSession,
    count_attention,
    count_fused_attention,
    gate_failures,
    measure_batch,
    reference_answers,
)
from export.engine_plan import EnginePlan, container_command, read_engine_plan
from export.validation import parity_images
from serve.errors import BundleError, FocalPathError
from serve.manifest import (
    MANIFEST_FILE,
    Artefact,
    Manifest,
    Parity,
    TensorRTBuild,
    read_bundle,
    sha256_of,
)

ENGINE_REPORT_FILE = "engine_report.json"
NUM_TILES = 4
"""Tiles of drawn tissue to compare on where no images are given."""


class WrongMachineError(FocalPathError):
    """The plan cannot be built here; the message's last line is the command for where it can."""

    exit_status = 2


class GateError(FocalPathError):
    """The plan was built but its answers are not good enough; it was deleted."""


def build_engine(
    bundle: Path,
    *,
    images: NDArray[np.uint8] | None = None,
    container: Sequence[str] | None = None,
    trt: ModuleType | None = None,
    gpu: Gpu | None = None,
) -> Path:
    """Build the bundle's TensorRT plan, prove it, and add it to the manifest.

    The plan appears under its name only once it has passed the gate.

    Args:
        bundle: the bundle's folder, with `engine_plan.json`.
        images: (N, H, W, 3) uint8, RGB: tiles to compare on; drawn tissue by default.
        container: the command to show where this machine cannot; `container_command` by default.
        trt: the `tensorrt` module; imported by default.
        gpu: the GPU to build on; the current CUDA device by default.

    Returns:
        The plan's path.

    Raises:
        BundleError: the bundle is damaged, or its ONNX file is not the one that was planned.
        FocalPathError: the images are not tiles of this model.
        WrongMachineError: no TensorRT, no GPU, or others than planned.
        EngineError: TensorRT cannot read, build or run the model.
        GateError: the answers are not good enough.
    """
    manifest = read_bundle(bundle)
    plan = read_engine_plan(bundle)
    precision = _check_source(bundle, manifest, plan)
    if images is not None:
        _check_images(images, manifest)
    with _pointing_to_the_container(plan, container or container_command(plan, bundle)):
        trt = trt or load_tensorrt()
        gpu = gpu or Gpu.find()
        _check_version(trt, plan)
        device = _check_gpu(gpu, plan)
    if images is None:
        images = parity_images(None, manifest.tile_size_px, NUM_TILES)
    staging = Path(tempfile.mkdtemp(prefix=".engine-", dir=bundle))
    try:
        serialized = build_plan(trt, plan, bundle)
        report = check_plan(trt, device, serialized, bundle, manifest, plan, images)
        failures = gate_failures(report, plan)
        if failures:
            raise GateError(
                f"{plan.plan_file} failed the gate and was deleted: {'; '.join(failures)}. "
                "Export with a float32 island where the activations are largest, or in fp32."
            )
        (staging / plan.plan_file).write_bytes(serialized)
        _install(bundle, staging, manifest, plan, report, precision)
    finally:
        shutil.rmtree(staging)
    return bundle / plan.plan_file


def load_tensorrt() -> ModuleType:
    """Import TensorRT.

    Raises:
        WrongMachineError: it is not installed, or its libraries are missing.
    """
    try:
        return importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        raise WrongMachineError(f"TensorRT cannot be imported on this machine: {error}.") from error


def check_plan(
    trt: ModuleType,
    gpu: Gpu,
    serialized: bytes,
    bundle: Path,
    manifest: Manifest,
    plan: EnginePlan,
    images: NDArray[np.uint8],
) -> EngineReport:
    """Run the plan at each batch size of its profile and report what it did.

    Raises:
        EngineError: the plan does not run, or has other inputs and outputs than the manifest.
    """
    reference = _reference_file(manifest, plan)
    expected: Answers = reference_answers(bundle / reference, images)
    logger = trt.Logger(trt.Logger.WARNING)
    session = PlanSession(trt, gpu, serialized, logger, manifest.inputs, manifest.outputs)
    session.check_interface(plan)
    return EngineReport(
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        tensorrt_version=trt.__version__,
        plan_bytes=len(serialized),
        reference_file=reference,
        num_tiles=len(images),
        num_layers=session.engine.num_layers,
        num_attention=count_attention(bundle / plan.onnx_file),
        num_fused_attention=count_fused_attention(trt, session.engine),
        batches=tuple(
            measure_batch(session, gpu, size, images, expected) for size in plan.batch.sizes
        ),
    )


def _check_source(bundle: Path, manifest: Manifest, plan: EnginePlan) -> str:
    """Check that the ONNX file is the planned one, and return its precision."""
    for artefact in manifest.artefacts:
        if artefact.file == plan.onnx_file and artefact.sha256 == plan.onnx_sha256:
            return artefact.precision
    path = bundle / plan.onnx_file
    found = sha256_of(path) if path.is_file() else "that of no file"
    raise BundleError(
        f"{path} is not the graph that was planned: its SHA-256 is {found}, engine_plan.json "
        f"expects {plan.onnx_sha256}. Export the checkpoint again."
    )


def _check_images(images: NDArray[np.uint8], manifest: Manifest) -> None:
    side = manifest.tile_size_px
    if images.dtype != np.uint8 or not len(images) or images.shape[1:] != (side, side, 3):
        raise FocalPathError(
            f"the images to compare on are {images.shape} {images.dtype}, expected "
            f"(N, {side}, {side}, 3) uint8 with at least one image"
        )


@contextlib.contextmanager
def _pointing_to_the_container(plan: EnginePlan, command: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except WrongMachineError as error:
        raise WrongMachineError(
            f"{error} Build {plan.plan_file} on a machine with a GPU of compute capability "
            f"{plan.compute_capability} (an A100 has 8.0):\n{shlex.join(command)}"
        ) from error


def _check_version(trt: ModuleType, plan: EnginePlan) -> None:
    if not plan.takes_version(trt.__version__):
        raise WrongMachineError(
            f"TensorRT here is {trt.__version__}, the plan is for {plan.tensorrt_min} up to, but "
            f"without, {plan.tensorrt_below}."
        )


def _check_gpu(gpu: Gpu | None, plan: EnginePlan) -> Gpu:
    if gpu is None:
        raise WrongMachineError("This machine has no CUDA device that torch can use.")
    if gpu.compute_capability != plan.compute_capability:
        raise WrongMachineError(
            f"{gpu.name} has compute capability {gpu.compute_capability}, the plan is for "
            f"{plan.compute_capability}, and would not run elsewhere."
        )
    return gpu


def _reference_file(manifest: Manifest, plan: EnginePlan) -> str:
    """The bundle's float32 graph, which is nearest to torch; else the plan's own."""
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
    precision: str,
) -> None:
    """Put the plan, its report and the manifest that names it into the bundle, each at once."""
    staged = staging / plan.plan_file
    artefact = Artefact.model_validate(
        {
            "file": plan.plan_file,
            "format": "tensorrt_plan",
            "precision": precision,
            "sha256": sha256_of(staged),
            "parity": Parity(
                num_tiles=report.num_tiles,
                label_agreement=min(batch.label_agreement for batch in report.batches),
            ),
            "tensorrt": TensorRTBuild(
                version=report.tensorrt_version,
                compute_capability=report.compute_capability,
                container_image=plan.container_image,
            ),
        }
    )
    others = tuple(a for a in manifest.artefacts if a.file != plan.plan_file)
    manifest.model_copy(update={"artefacts": (*others, artefact)}).write(staging)
    (staging / ENGINE_REPORT_FILE).write_text(report.model_dump_json(indent=2) + "\n", "utf-8")
    for name in (plan.plan_file, ENGINE_REPORT_FILE, MANIFEST_FILE):
        (staging / name).replace(bundle / name)
