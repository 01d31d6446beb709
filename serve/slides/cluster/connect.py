"""The connection to a Ray cluster: whether its head answers, and how many workers have room."""

import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from serve.settings import InferenceSettings
from serve.slides.errors import ClusterError
from serve.slides.options import ClusterOptions

_CONNECT_S = 10.0
_OBJECT_STORE_BYTES = 100 * 2**20
"""Of a cluster that is started here. Small: only numbers and names go through it, no tiles."""
_EVERY_S = 2.0
_GIVE_UP_S = 30.0
"""Ray itself gives up after 60. A head that is started again in time is found again."""


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
            with _own_sigterm():
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
def _own_sigterm() -> Iterator[None]:
    """Keep this process's handler of SIGTERM: Ray's prints a stack of its own C++."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


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


class HeadWatch:
    """Checks every two seconds whether the head listens, in its own thread.

    Without it Ray ends this process after a minute, with advice on logs that the user may not have.

    Args:
        address: host:port of the head.
        tell: called with one line for the user.
    """

    def __init__(
        self,
        address: str,
        tell: Callable[[str], None],
        *,
        every_s: float = _EVERY_S,
        give_up_s: float = _GIVE_UP_S,
    ) -> None:
        self._address = address
        self._tell = tell
        self._every_s, self._give_up_s = every_s, give_up_s
        self._stop = threading.Event()
        self.error: ClusterError | None = None
        """Set once the head has not answered for too long."""
        self._thread = threading.Thread(target=self._run, name="head", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()

    def _run(self) -> None:
        since: float | None = None
        while not self._stop.wait(self._every_s):
            try:
                check_listening(self._address, self._every_s)
            except OSError:
                now = time.monotonic()
                if since is None:
                    since = now
                    self._tell(
                        f"the head of the cluster at {self._address} does not answer; waiting "
                        f"{self._give_up_s:g} s for it"
                    )
                if now - since >= self._give_up_s:
                    self.error = ClusterError(
                        f"the head of the cluster at {self._address} has not answered for "
                        f"{self._give_up_s:g} s. Start the cluster again and give the same command "
                        "again, or the same without --cluster: finished blocks are kept."
                    )
                    return
            else:
                if since is not None:
                    since = None
                    self._tell("the head of the cluster answers again")


def check_listening(address: str, timeout_s: float) -> None:
    """Raise OSError if nothing listens at host:port."""
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()


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
