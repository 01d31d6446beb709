"""Describes the machine that a process runs on, for the whole project.

The gate records the kind of processor on which a runtime passed, serving compares it with its own,
and measurements name the machine on which they were made.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from serve.contract.cpu_quota import cpu_quota
from serve.contract.strict import Strict

_CPU_INFO = Path("/proc/cpuinfo")
_STATUS = Path("/proc/self/status")
_TOOL_TIMEOUT_S = 20
_VENDORS = {
    "AuthenticAMD": "AMD",
    "GenuineIntel": "Intel",
    "HygonGenuine": "Hygon",
    "0x41": "Arm",
    "0x61": "Apple",
    "0xc0": "Ampere",
    "0x4e": "NVIDIA",
    "0x48": "HiSilicon",
}
"""By vendor_id on x86-64, by `CPU implementer` on aarch64 (Linux)."""
_INSTRUCTION_SETS = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx_vnni": "avx_vnni",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "asimd": "neon",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
}
"""Instruction sets that decide which kernels a runtime uses: Linux' names, and ours."""


class Processor(Strict):
    """A CPU."""

    name: str
    """The name that it reports, such as `AMD EPYC 9654 96-Core Processor`."""
    vendor: str
    """`AMD`, `Intel`, `Apple`, ...; `unknown` where the system does not say."""
    architecture: str
    """`x86_64` or `aarch64`."""
    instruction_sets: tuple[str, ...]
    """Those that decide which kernels a runtime uses."""

    @property
    def kind(self) -> str:
        """What a runtime's answers may depend on: vendor and instruction sets, but not the model.

        Two processors of one kind run the same kernels.
        """
        return " ".join((self.architecture, self.vendor, *self.instruction_sets))

    @property
    def title(self) -> str:
        """Its name and its kind, for reports."""
        return f"{self.name} ({self.kind})"


class Gpu(Strict):
    """An NVIDIA GPU, as its driver describes it."""

    name: str
    compute_capability: str
    """Such as `8.0`."""
    memory_mib: int
    driver: str

    @property
    def kind(self) -> str:
        """What a runtime's answers may depend on."""
        return f"NVIDIA sm_{self.compute_capability.replace('.', '')}"


class Machine(Strict):
    """A machine as this process sees it."""

    processor: Processor
    num_cpus: int
    """CPUs that this process may use."""
    memory_gib: float | None
    system: str
    python: str
    gpus: tuple[Gpu, ...]


def this_machine() -> Machine:
    """Describe the machine that this process runs on."""
    return Machine(
        processor=this_processor(),
        num_cpus=usable_cpus(),
        memory_gib=_memory_gib(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        gpus=visible_gpus(),
    )


@cache
def this_processor() -> Processor:
    """Describe the processor, as the operating system reports it."""
    if _CPU_INFO.is_file():
        return parse_cpu_info(_CPU_INFO.read_text(encoding="utf-8"), platform.machine())
    name = _output("sysctl", "-n", "machdep.cpu.brand_string").strip()
    vendor = next((word for word in ("Apple", "Intel") if word in name), "unknown")
    architecture = {"arm64": "aarch64"}.get(platform.machine(), platform.machine())
    return Processor(
        name=name or platform.processor() or platform.machine(),
        vendor=vendor,
        architecture=architecture,
        instruction_sets=("neon",) if architecture == "aarch64" else (),
    )


def parse_cpu_info(text: str, architecture: str) -> Processor:
    """Parse the content of Linux' /proc/cpuinfo.

    Args:
        text: the file's content.
        architecture: as `platform.machine()` gives it.
    """
    entries: dict[str, str] = {}
    for line in text.splitlines():
        key, separator, value = line.partition(":")
        if separator:
            entries.setdefault(key.strip(), " ".join(value.split()))  # of the first core
    identity = entries.get("vendor_id") or entries.get("CPU implementer", "")
    vendor = _VENDORS.get(identity, identity or "unknown")
    flags = set((entries.get("flags") or entries.get("Features", "")).split())
    part = entries.get("CPU part")
    return Processor(
        name=entries.get("model name") or (f"{vendor} {part}" if part else architecture),
        vendor=vendor,
        architecture=architecture,
        instruction_sets=tuple(ours for flag, ours in _INSTRUCTION_SETS.items() if flag in flags),
    )


def usable_cpus() -> int:
    """CPUs that this process may use, by its affinity and the quota of its container."""
    if hasattr(os, "sched_getaffinity"):
        num_cpus = len(os.sched_getaffinity(0))
    else:
        num_cpus = os.cpu_count() or 1
    return min(num_cpus, cpu_quota() or num_cpus)


def visible_gpus() -> tuple[Gpu, ...]:
    """The GPUs that NVIDIA's driver knows; none where its tool `nvidia-smi` is missing or fails."""
    fields = "name,compute_cap,memory.total,driver_version"
    listing = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    rows = [[part.strip() for part in line.split(",")] for line in listing.splitlines()]
    return tuple(
        Gpu(name=row[0], compute_capability=row[1], memory_mib=int(row[2]), driver=row[3])
        for row in rows
        if len(row) == 4 and row[2].isdecimal()
    )


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of the packages that are installed; the others are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_memory_mib() -> float:
    """The most memory that this process has held at a time, in MiB.

    Linux counts the memory of the program that started this one into `ru_maxrss`, but not into the
    process's own status.
    """
    try:
        fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 2**10
    except (OSError, KeyError):
        import resource  # Windows has none

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _memory_gib() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return None


def _output(*command: str) -> str:
    """Output of a system tool; empty if the tool is missing or fails."""
    try:
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
