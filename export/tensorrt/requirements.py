"""What must hold before an engine is built: the graph, TensorRT and the GPU."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from export.errors import BundleError, GraphError, WrongMachineError
from export.tensorrt.container import ContainerBuild
from export.tensorrt.plan import EnginePlan
from serve.contract.manifest import Manifest, sha256_of


def load_tensorrt() -> ModuleType:
    """Import TensorRT.

    Raises:
        WrongMachineError: TensorRT is not installed, or its libraries are missing.
    """
    try:
        return importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        raise WrongMachineError(f"TensorRT cannot be imported on this machine: {error}.") from error


def check_source(bundle: Path, manifest: Manifest, plan: EnginePlan) -> None:
    """Check that the ONNX file is the planned one.

    Raises:
        BundleError: it is another one, or missing.
    """
    if (plan.onnx_file, plan.onnx_sha256) in [(a.file, a.sha256) for a in manifest.artefacts]:
        return
    path = bundle / plan.onnx_file
    found = f"its SHA-256 is {sha256_of(path)}" if path.is_file() else "it does not exist"
    raise BundleError(
        f"{path} is not the planned graph: {found}; engine_plan.json expects the SHA-256 "
        f"{plan.onnx_sha256}. Export the checkpoint again."
    )


def check_obstacles(plan: EnginePlan) -> None:
    """Check that TensorRT's parser reads the graph.

    Raises:
        GraphError: it would refuse it.
    """
    if plan.obstacles:
        listing = "\n".join(f"  {obstacle}" for obstacle in plan.obstacles)
        raise GraphError(
            f"TensorRT cannot build an engine from {plan.onnx_file}; its parser would refuse:\n"
            f"{listing}\nServe the bundle with ONNX Runtime, or train with another encoder."
        )


@contextlib.contextmanager
def pointing_to(container: ContainerBuild, plan: EnginePlan) -> Iterator[None]:
    """Add to a WrongMachineError how to build on another machine."""
    try:
        yield
    except WrongMachineError as error:
        raise WrongMachineError(
            f"{error} Build {plan.plan_file} on a machine with a GPU of compute capability "
            f"{plan.compute_capability} (an A100 has 8.0):\n{container}"
        ) from error


def check_version(trt: ModuleType, plan: EnginePlan) -> None:
    """Check that TensorRT has the planned version.

    Raises:
        WrongMachineError: it has another one.
    """
    if not plan.takes_version(trt.__version__):
        raise WrongMachineError(
            f"TensorRT here is {trt.__version__}; expected {plan.tensorrt_version}, as in "
            f"{plan.serving_image}, which loads no other version's plans. For a server with "
            f"TensorRT {trt.__version__}, give --tensorrt-version."
        )


def check_capability(name: str, compute_capability: str, plan: EnginePlan) -> None:
    """Check that a GPU has the planned compute capability.

    Raises:
        WrongMachineError: it has another one.
    """
    if compute_capability != plan.compute_capability:
        raise WrongMachineError(
            f"{name} has compute capability {compute_capability}; expected "
            f"{plan.compute_capability}, as the plan runs on no other. For a server with this "
            f"GPU, give --compute-capability {compute_capability}."
        )
