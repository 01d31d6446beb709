"""Export a checkpoint to a bundle that has proved itself, or build its TensorRT engine.

python -m export CHECKPOINT --out BUNDLE   ONNX in several precisions, gated, with its reports
python -m export engine BUNDLE             a TensorRT plan, on the GPU that will serve it
"""

import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from export.bundle import BundleSettings, write_bundle
from export.engine import WrongMachineError, build_engine
from export.engine_plan import container_command, read_engine_plan
from export.triton_repository import Target, publish
from export.validation import parity_images
from serve.errors import FocalPathError as ServeError
from serve.manifest import read_bundle
from train.errors import FocalPathError

ENGINE = "engine"
_DOCKER_FAILED = 125
"""Docker's own status where it could not start the container: no daemon, no image, no GPU."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export a checkpoint to a bundle and, when asked, publish it in Triton's repository.

    `python -m export engine BUNDLE` builds a bundle's TensorRT engine; it has its own --help.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A run's folder or its model.safetensors."""
    out: Path
    """The bundle's folder; an earlier bundle there is replaced once the new one has passed."""
    model_repository: Path | None = None
    """Triton's model repository; the bundle becomes its newest version."""
    target: Target = "onnxruntime"
    """What runs the model inside Triton."""
    keep: int | None = None
    """Versions to keep in the model repository, older ones are deleted; by default all."""
    bundle: Annotated[BundleSettings, tyro.conf.arg(name="")]

    def run(self) -> None:
        """Export, publish, say where it is."""
        if self.keep is not None and self.keep < 1:
            raise FocalPathError(f"--keep is {self.keep}; expected at least 1")
        console = Console()
        manifest = write_bundle(self.checkpoint, self.out, self.bundle)
        for artefact in manifest.artefacts:
            parity = artefact.parity
            console.print(
                f"{self.out / artefact.file}: same label as torch on "
                f"{parity.label_agreement:.4%} of the pixels of {parity.num_tiles} tiles, "
                f"largest logit difference {parity.max_logit_difference or 0:.1e}",
                soft_wrap=True,
            )
        if self.model_repository is not None:
            version = publish(self.out, self.model_repository, self.target, keep=self.keep)
            console.print(f"{version}: published for Triton, target {self.target}")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Build a bundle's TensorRT engine as its engine_plan.json says, and prove it.

    Exit status 2 where this machine cannot: the last line is then the command for one that can.
    """

    bundle: tyro.conf.Positional[Path]
    """The bundle's folder; the plan is added to it once it has passed the gate."""
    validate: Path | None = None
    """Data set to compare with ONNX Runtime on; by default drawn tissue."""
    num_tiles: int = 4
    """Tiles to compare on."""
    docker: bool = False
    """Where this machine lacks TensorRT and docker is there, run that command."""

    def run(self) -> None:
        """Build here, or in the container."""
        manifest, plan = read_bundle(self.bundle), read_engine_plan(self.bundle)
        images = parity_images(self.validate, manifest.tile_size_px, self.num_tiles)
        container = container_command(
            plan, self.bundle, data=self.validate, num_tiles=self.num_tiles
        )
        try:
            path = build_engine(self.bundle, images=images, container=container)
        except WrongMachineError as error:
            if not self.docker or shutil.which("docker") is None:
                raise
            Console().print(f"Building in {plan.container_image}", highlight=False)
            _run_container(container, error)
            return
        Console().print(f"{path}: built and compared with ONNX Runtime")


def _run_container(command: Sequence[str], reason: WrongMachineError) -> None:
    status = subprocess.run(command, check=False).returncode
    if status == _DOCKER_FAILED:
        raise reason
    if status:
        raise FocalPathError(f"the container ended with status {status}; it says why above")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; what the user can mend ends with one line and its exit status."""
    # So that a terminated export clears up as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command: Export | Engine
    if arguments[:1] == [ENGINE]:
        command = tyro.cli(Engine, prog=f"python -m export {ENGINE}", args=arguments[1:])
    else:
        command = tyro.cli(
            Export, prog="python -m export", args=arguments, config=(tyro.conf.OmitArgPrefixes,)
        )
    try:
        command.run()
    except (FocalPathError, ServeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_status", 1))
    except KeyboardInterrupt:
        print("error: interrupted; nothing was changed", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
