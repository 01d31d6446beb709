"""Builds a plan in NVIDIA's TensorRT container, for the Triton of the same release."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from export.tensorrt.plan import EnginePlan

BUNDLE_MOUNT: Final = "/bundle"
DATA_MOUNT: Final = "/data"
CHECKOUT = Path(__file__).resolve().parents[2]
"""Folder of FocalPath's Dockerfile, unless FocalPath is an installed package."""


def container_image() -> str | None:
    """NVIDIA's TensorRT image that this process runs in, or that its image is based on."""
    release = os.environ.get("NVIDIA_TENSORRT_VERSION", "")
    if not re.fullmatch(r"\d\d\.\d\d", release):  # other NVIDIA images have versions such as 8.5.2
        return None
    return f"nvcr.io/nvidia/tensorrt:{release}-py3"


class ContainerBuild:
    """The commands that build the container image and, in it, the plan."""

    def __init__(
        self, plan: EnginePlan, bundle: Path, *, data: Path | None, options: Sequence[str] = ()
    ) -> None:
        """Prepare the commands.

        Args:
            plan: what to build.
            bundle: the bundle's folder, which receives the plan.
            data: data set to compare on; None for synthetic tissue.
            options: further options of `python -m export engine`.
        """
        tag = f"focalpath-export:{plan.container_image.rpartition(':')[2]}"
        volumes = [f"{bundle.resolve()}:{BUNDLE_MOUNT}"]
        if data is not None:
            # Keeps the folder's name, which the report shows.
            mount = f"{DATA_MOUNT}/{data.resolve().name}"
            volumes.append(f"{data.resolve()}:{mount}:ro")
            options = ("--validate", mount, *options)
        # Needs both: with a terminal but no input, docker would not forward Ctrl-C.
        terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._again = f"python -m export engine {shlex.quote(str(bundle))} --docker"
        self.image = (
            *("docker", "build", "--target", "export", "--tag", tag),
            *("--build-arg", f"TENSORRT={plan.container_image}", str(CHECKOUT)),
        )
        self.plan = (
            *("docker", "run", "--rm", "--init", "--gpus", "all"),
            *(("--interactive", "--tty") if terminal else ()),
            *("--user", f"{os.getuid()}:{os.getgid()}"),
            *(part for volume in volumes for part in ("--volume", volume)),
            *(tag, "engine", BUNDLE_MOUNT, *options),
        )

    @property
    def possible(self) -> bool:
        """Whether this is a source checkout, which the image is built from."""
        return (CHECKOUT / "Dockerfile").is_file()

    def __str__(self) -> str:
        """The shell command to run, or how to get one."""
        if not self.possible:
            return (
                "FocalPath is installed here without its Dockerfile. Get its source and, in that "
                f"folder, run: {self._again}"
            )
        own = f"--user {os.getuid()}:{os.getgid()}"
        plan = shlex.join(self.plan).replace(own, '--user "$(id -u):$(id -g)"')
        return f"{shlex.join(self.image)} && {plan}"

    def run(self) -> int:
        """Build the image, then replace this process with the command that builds the plan.

        Docker then handles signals, the terminal and the exit status.

        Returns:
            docker's exit status if it cannot build the image.
        """
        status = subprocess.run(self.image, check=False).returncode
        if not status:
            os.execvp(self.plan[0], self.plan)
        return status
