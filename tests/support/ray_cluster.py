"""Ray clusters of two nodes for tests: in network namespaces, or side by side on one machine.

Everything that is started here is ended here, by its process id: `ray stop` would end every Ray of
the machine.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.support import ROOT

_START_S = 180
_STORE_BYTES = str(80 * 2**20)


class NoNamespacesError(RuntimeError):
    """This user may not make network namespaces."""


@dataclass
class RayCluster:
    """A head and one more node, each with room for one worker."""

    address: str
    environment: dict[str, str]
    addresses: set[str]
    """Of the nodes."""
    node_pids: Sequence[int]
    """Process from which all of a node's processes come; the head's first."""
    prefix: Sequence[str] = ()
    """Of commands that run on the head's machine."""
    started: "list[subprocess.Popen[bytes]]" = field(default_factory=list)
    """Ended with the cluster."""

    def start(self, *command: str, log: Path) -> "subprocess.Popen[bytes]":
        """Start a Python command on the head's machine."""
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*self.prefix, sys.executable, *command],
                cwd=ROOT,
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)
        return process

    def workers(self) -> list[psutil.Process]:
        """The processes that hold a model."""
        return [
            process
            for pid in self.node_pids
            for process in _family(pid)
            if re.match(r"ray::\w+Worker\b", _command(process))
        ]

    def kill_node(self, node: int) -> None:
        """End all of a node's processes at once, as a power switch does."""
        for process in _family(self.node_pids[node]):
            _kill(process.pid)


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Of everything that belongs to one cluster."""
    home = folder / "home"
    home.mkdir(parents=True, exist_ok=True)
    return {
        **os.environ,
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        **variables,
    }


@contextlib.contextmanager
def side_by_side(folder: Path) -> Iterator[RayCluster]:
    """Two nodes on this machine, by `ray.cluster_utils.Cluster`."""
    sockets = _short_folder()
    # `Cluster` writes its address below the default folder, which may not be there.
    (Path(sockets) / "ray").mkdir()
    variables = environment(folder, RAY_TMPDIR=sockets)
    with (folder / "cluster.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.ray_cluster", sockets],
            cwd=ROOT,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    assert process.stdout is not None
    started: list[subprocess.Popen[bytes]] = []
    try:
        line = process.stdout.readline()
        assert line, (folder / "cluster.log").read_text()[-2000:]
        told = json.loads(line)
        cluster = RayCluster(
            told["address"], variables, {told["address"].partition(":")[0]}, told["raylets"]
        )
        started = cluster.started
        yield cluster
    finally:
        end([*started, process])
        shutil.rmtree(sockets, ignore_errors=True)


@contextlib.contextmanager
def in_namespaces(folder: Path) -> Iterator[RayCluster]:
    """Two nodes in network namespaces that a cable joins.

    Raises:
        NoNamespacesError: they cannot be made here.
    """
    names = [f"focalpath-{os.getpid()}-{side}" for side in "ab"]
    started: list[subprocess.Popen[bytes]] = []
    variables, sockets = environment(folder), _short_folder()
    try:
        _join(names)
        for index, name in enumerate(names):
            where = ["--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={sockets}"]
            where = ["--address=10.77.0.1:6379"] if index else where
            where.append(f"--node-ip-address=10.77.0.{index + 1}")
            started.append(_start_node(name, where, folder / f"{name}.log", variables))
        pids = [process.pid for process in started]
        prefix = ("ip", "netns", "exec", names[0])
        yield RayCluster(
            "10.77.0.1:6379", variables, {"10.77.0.1", "10.77.0.2"}, pids, prefix, started
        )
    finally:
        end(started)
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        shutil.rmtree(sockets, ignore_errors=True)


def _join(names: Sequence[str]) -> None:
    commands = [
        *(["netns", "add", name] for name in names),
        ["link", "add", "cable", "netns", names[0], "type", "veth", "peer", "cable", "netns"]
        + [names[1]],
        *(
            ["-n", name, *words]
            for number, name in enumerate(names, start=1)
            for words in (
                ["address", "add", f"10.77.0.{number}/24", "dev", "cable"],
                ["link", "set", "lo", "up"],
                ["link", "set", "cable", "up"],
            )
        ),
    ]
    if shutil.which("ip") is None:
        raise NoNamespacesError("there is no `ip` (iproute2)")
    for command in commands:
        done = subprocess.run(["ip", *command], capture_output=True, text=True)
        if done.returncode != 0:
            raise NoNamespacesError(done.stderr.strip())


def _start_node(
    name: str, where: Sequence[str], log: Path, variables: dict[str, str]
) -> "subprocess.Popen[bytes]":
    """Start a node, and wait until it has joined."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *where, "--num-cpus=1"]
    command += [f"--object-store-memory={_STORE_BYTES}", "--block"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["ip", "netns", "exec", name, *command],
            env=variables,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    deadline = time.monotonic() + _START_S
    while b"Ray runtime started" not in log.read_bytes():
        if process.poll() is not None or time.monotonic() > deadline:
            end([process])
            raise AssertionError(log.read_text()[-2000:])
        time.sleep(0.1)
    return process


def end(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """End processes and all that they have started."""
    for process in processes:
        for member in _family(process.pid):
            _kill(member.pid)
    for process in processes:
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _short_folder() -> str:
    """A place for Ray's sockets, whose paths may have 107 characters at most."""
    return tempfile.mkdtemp(prefix="ray-")


def _main(folder: str) -> None:
    """Hold a cluster until standard input ends."""
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "object_store_memory": int(_STORE_BYTES)}
    head = {**options, "temp_dir": folder, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.head_node, cluster.add_node(**options)]
    raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
    print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _main(sys.argv[1])
