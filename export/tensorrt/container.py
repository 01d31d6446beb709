"""NVIDIA's container: where a plan is built that the same release of Triton can load."""

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
"""Where FocalPath's Dockerfile is, unless it runs installed."""


def container_image() -> str | None:
    """NVIDIA's TensorRT image that this process runs in, also in one made from it."""
    release = os.environ.get("NVIDIA_TENSORRT_VERSION", "")
    if not re.fullmatch(r"\d\d\.\d\d", release):  # 8.5.2 in others of NVIDIA's images
        return None
    return f"nvcr.io/nvidia/tensorrt:{release}-py3"


class ContainerBuild:
    """The commands that build a plan in its container: first the image, once, then the plan."""

    def __init__(
        self, plan: EnginePlan, bundle: Path, *, data: Path | None, options: Sequence[str] = ()
    ) -> None:
        """Prepare the commands.

        Args:
            plan: how to build.
            bundle: the bundle's folder, which gets the plan.
            data: data set to compare on; by default drawn tissue.
            options: more options of `python -m export engine`.
        """
        tag = f"focalpath-export:{plan.container_image.rpartition(':')[2]}"
        volumes = [f"{bundle.resolve()}:{BUNDLE_MOUNT}"]
        if data is not None:
            # Under its own name, which the report tells.
            mount = f"{DATA_MOUNT}/{data.resolve().name}"
            volumes.append(f"{data.resolve()}:{mount}:ro")
            options = ("--validate", mount, *options)
        # Together: with a terminal but no input, docker would not pass Ctrl-C on.
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
        """Whether this is a checkout, which the image is made of."""
        return (CHECKOUT / "Dockerfile").is_file()

    def __str__(self) -> str:
        """The one line to type, or what it takes to have one."""
        if not self.possible:
            return (
                "FocalPath is installed here without its Dockerfile. Get its source, and in that "
                f"folder run: {self._again}"
            )
        own = f"--user {os.getuid()}:{os.getgid()}"
        plan = shlex.join(self.plan).replace(own, '--user "$(id -u):$(id -g)"')
        return f"{shlex.join(self.image)} && {plan}"

    def run(self) -> int:
        """Build the image, then become the command that builds the plan.

        Signals, the terminal and the exit status are then docker's own.

        Returns:
            docker's exit status where it cannot build the image.
        """
        status = subprocess.run(self.image, check=False).returncode
        if not status:
            os.execvp(self.plan[0], self.plan)
        return status
