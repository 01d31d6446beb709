"""Ports for the servers of tests, and for addresses where nothing listens."""

import contextlib
import itertools
import os
import random
import socket
from pathlib import Path

_LOWEST = 10_000
_RANGE_FILE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_USUAL_RANGE = "32768 60999"


def _candidates() -> list[int]:
    """Ports below those that the system gives to connections and to servers that ask for any.

    Each process of pytest-xdist has its own.
    """
    text = _RANGE_FILE.read_text() if _RANGE_FILE.is_file() else _USUAL_RANGE
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ports = list(range(_LOWEST + number, int(text.split()[0]), processes))
    random.SystemRandom().shuffle(ports)  # another run draws other ones
    return ports


_PORTS = itertools.cycle(_candidates())


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing uses now.

    A port that is free now may be taken before a server opens it. These are no port that the system
    gives out unasked, and this process draws none of them again soon.
    """
    found: list[int] = []
    while len(found) < count:
        port = next(_PORTS)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found


def free_port() -> int:
    """One of `free_ports`."""
    return free_ports(1)[0]
