"""The connection to a Ray cluster, and how many workers of which size it has room for."""

import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from serve.settings import InferenceSettings
from serve.slides.cluster.head import check_listening
from serve.slides.errors import ClusterError
from serve.slides.options import ClusterOptions

_CONNECT_S = 10.0
_OBJECT_STORE_BYTES = 100 * 2**20
"""Of a cluster that is started here. Small: only numbers and names go through it, no tiles."""


def connect(address: str) -> None:
    """Connect this process to a cluster, or start one where the address is `local`.

    Raises:
        ClusterError: there is none, or it rejects this machine's token.
    """
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address == "local":
        os.environ.setdefault(
            "RAY_AUTH_TOKEN", secrets.token_hex(32)
        )  # a cluster for this run alone
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    else:  # where machines are lost, Ray's C++ would write its own log between our lines
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with _captured_stderr() as warnings:
        try:
            named = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
            check_listening(named, _CONNECT_S)  # Ray itself would try for minutes
            ray.init(address=address, **options)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            if "InvalidAuthToken" in warnings():
                raise ClusterError(
                    f"the Ray cluster at {address} does not take this machine's token. Set "
                    "RAY_AUTH_TOKEN to the cluster's."
                ) from error
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise ClusterError(
                f"no Ray cluster answers at {address!r}: {reason}. Start one with `ray start "
                "--head`, join the other machines with `ray start --address=HEAD:6379`, and give "
                "all of them the same RAY_AUTH_TOKEN, this process too."
            ) from error


@contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """Capture what Ray's libraries print on standard error, and yield it."""
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: os.pread(file.fileno(), 2**20, 0).decode(errors="replace")
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)


@dataclass(frozen=True)
class Room:
    """The resources of one machine of the cluster."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Crew:
    """The number of workers, and the resources of each."""

    count: int
    cpus: int
    gpus: float


def rooms() -> list[Room]:
    """The resources of each machine of the cluster that is alive."""
    nodes: Sequence[Mapping[str, Any]] = ray.nodes()
    return [
        Room(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
        for node in nodes
        if node["Alive"]
    ]


def size_crew(
    machines: Sequence[Room], options: ClusterOptions, settings: InferenceSettings
) -> Crew:
    """Choose the number of workers, and the resources of each.

    Raises:
        ClusterError: no machine has room for a worker, and the user gave no number of workers.
    """
    gpus = options.worker_gpus
    if gpus is None:
        may_use = settings.backend == "onnxruntime" and settings.provider in ("auto", "cuda")
        gpus = float(may_use and any(machine.gpus >= 1 for machine in machines))
    least = max(options.worker_cpus, 1)
    usable = [machine for machine in machines if machine.cpus >= least and machine.gpus >= gpus]
    if not usable:
        if options.workers:  # a cluster that grows when workers are waiting
            return Crew(options.workers, least, gpus)
        raise ClusterError(
            f"no machine of the cluster has {least} CPU{'s' * (least > 1)} and {gpus:g} GPU for a "
            f"worker; it has {_listed(machines)}. Lower --worker-cpus or --worker-gpus, or say "
            "with --workers how many shall be waited for."
        )
    cpus = options.worker_cpus
    if not cpus:
        share = -(-options.workers // len(usable)) if options.workers else 1
        cpus = min(
            int(machine.cpus) // max(int(machine.gpus // gpus) if gpus else share, 1)
            for machine in usable
        )
        cpus = max(cpus, 1)
    fits = sum(
        min(int(machine.cpus // cpus), int(machine.gpus // gpus) if gpus else 2**31)
        for machine in usable
    )
    return Crew(options.workers or fits, cpus, gpus)


def _listed(machines: Sequence[Room]) -> str:
    return (
        ", ".join(f"{machine.cpus:g} CPUs and {machine.gpus:g} GPUs" for machine in machines)
        or "none"
    )
