"""How much of the processors a container or service may use, where its cgroup limits that."""

import math
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def cpu_quota() -> int:
    """CPUs' worth of time that this process may take, rounded up; 0: as many as there are.

    `docker --cpus`, the limits of Kubernetes and systemd's CPUQuota set it (cgroup v2). The process
    still sees every CPU: with a thread on each it would be stopped for most of the time.
    """
    own = [line for line in _text(_OWN).splitlines() if line.startswith("0::/")]
    path = Path(own[0].removeprefix("0::/") if own else "")
    quotas = []
    for folder in (path, *path.parents):
        quota, _, period = _text(_CGROUPS / folder / "cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal():
            quotas.append(math.ceil(int(quota) / int(period)))
    return min(quotas, default=0)


def _text(path: Path) -> str:
    """A file's text; empty where there is none, as on other systems."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
