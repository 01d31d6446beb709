"""The command `python -m export engine`: its options and output."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from export.errors import WrongMachineError
from export.gate.tiles import validation_tiles
from export.tensorrt.container import ContainerBuild
from export.tensorrt.engine import build_engine
from export.tensorrt.plan import EnginePlan, read_engine_plan
from export.tensorrt.requirements import check_capability, pointing_to
from serve.contract.machine import visible_gpus
from serve.contract.manifest import read_bundle


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Build a bundle's TensorRT engine from its engine_plan.json, and run the gate on it.

    If this machine cannot build it, the exit status is 2. The last line is then the command for a
    machine that can.
    """

    bundle: tyro.conf.Positional[Path]
    """Folder of the bundle. The plan is added after it passes the gate."""
    validate: Path | None = None
    """Data set with tiles to compare with ONNX Runtime. The default is synthetic tissue."""
    num_tiles: int = 4
    """Number of tiles to compare."""
    compute_capability: str | None = None
    """Compute capability of the serving GPU, such as 9.0, if it is not an A100. The build needs a
    GPU of the same kind."""
    tensorrt_version: str | None = None
    """TensorRT version of the server, such as 10.16, if it differs from the planned image's."""
    docker: bool = False
    """If this machine has docker but not TensorRT, run that command."""

    def run(self) -> None:
        """Build on this machine or in the container."""
        manifest = read_bundle(self.bundle)
        plan = read_engine_plan(self.bundle).for_server(
            tensorrt_version=self.tensorrt_version, compute_capability=self.compute_capability
        )
        container = ContainerBuild(
            plan, self.bundle, data=self.validate, options=self._other_options()
        )
        tiles = validation_tiles(
            self.validate,
            manifest.tile_size_px,
            self.num_tiles,
            class_names=[entry.name for entry in manifest.classes],
            mpp=manifest.mpp,
        )
        console = Console(highlight=False, soft_wrap=True)
        try:
            report = build_engine(self.bundle, plan, tiles, container)
        except WrongMachineError:
            if not self.docker or shutil.which("docker") is None or not container.possible:
                raise
            if not _has_gpu(plan, container):
                raise
            console.print(f"Building in {plan.container_image}: {container}", markup=False)
            if container.run():
                raise
            return
        console.print(f"{self.bundle / plan.plan_file}: built, and passed the gate", markup=False)
        for line in report.summary():
            console.print(line, markup=False)

    def _other_options(self) -> list[str]:
        options = ["--num-tiles", str(self.num_tiles)]
        if self.compute_capability is not None:
            options += ["--compute-capability", self.compute_capability]
        if self.tensorrt_version is not None:
            options += ["--tensorrt-version", self.tensorrt_version]
        return options


def _has_gpu(plan: EnginePlan, container: ContainerBuild) -> bool:
    """Whether the driver lists a GPU of the planned kind. Checked before a large download."""
    gpus = visible_gpus()
    if gpus and plan.compute_capability not in [gpu.compute_capability for gpu in gpus]:
        with pointing_to(container, plan):
            check_capability(gpus[0].name, gpus[0].compute_capability, plan)
    return bool(gpus)
