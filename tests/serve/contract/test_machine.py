import subprocess
import sys
from pathlib import Path

import pytest

from serve.contract.machine import (
    Gpu,
    installed_versions,
    parse_cpu_info,
    this_machine,
    visible_gpus,
)

XEON = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R)  Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu sse4_2 avx2 avx512f avx512_bf16 amx_bf16 amx_tile amx_int8 avx512_vnni avx512_fp16

processor\t: 1
vendor_id\t: GenuineIntel
model name\t: another
flags\t\t: avx2
"""
EPYC = """vendor_id\t: AuthenticAMD
model name\t: AMD EPYC
flags\t\t: sse4_2 avx2 avx512f avx_vnni avx512_bf16 avx512_vnni
"""
OLD = """vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) CPU X5550
flags\t\t: sse4_2
"""
GRAVITON = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd asimddp sve i8mm bf16
CPU implementer\t: 0x41
CPU part\t: 0xd40
"""


@pytest.mark.parametrize(
    ("text", "architecture", "name", "kind"),
    [
        (
            XEON,
            "x86_64",
            "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
            "x86_64 Intel avx2 avx512 avx512_vnni avx512_bf16 avx512_fp16 amx_int8 amx_bf16",
        ),
        (EPYC, "x86_64", "AMD EPYC", "x86_64 AMD avx2 avx512 avx_vnni avx512_vnni avx512_bf16"),
        (OLD, "x86_64", "Intel(R) Xeon(R) CPU X5550", "x86_64 Intel"),
        (GRAVITON, "aarch64", "Arm 0xd40", "aarch64 Arm neon dotprod i8mm bf16 sve"),
        ("", "riscv64", "riscv64", "riscv64 unknown"),
    ],
)
def test_a_processors_kind_is_its_vendor_and_its_instruction_sets(
    text: str, architecture: str, name: str, kind: str
) -> None:
    processor = parse_cpu_info(text, architecture)
    assert (processor.name, processor.kind) == (name, kind)
    assert processor.title == f"{name} ({kind})"


def test_gpus_are_those_that_the_driver_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = "NVIDIA A100-SXM4-80GB, 8.0, 81920, 570.86.15\nbroken line\n"
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 0, stdout=listing),
    )
    (gpu,) = visible_gpus()
    assert gpu == Gpu(
        name="NVIDIA A100-SXM4-80GB",
        compute_capability="8.0",
        memory_mib=81920,
        driver="570.86.15",
    )
    assert gpu.kind == "NVIDIA sm_80"


def test_a_machine_without_nvidias_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert visible_gpus() == ()


def test_this_machine_can_be_described() -> None:
    machine = this_machine()
    assert machine.num_cpus >= 1
    assert machine.processor.name
    if Path("/proc/cpuinfo").is_file():
        assert machine.processor.architecture in machine.processor.kind


def test_versions_leave_out_what_is_not_installed() -> None:
    assert set(installed_versions(["numpy", "no-such-package"])) == {"numpy"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process inherits nothing")
def test_peak_memory_is_of_the_process_alone_and_grows_with_what_it_allocates() -> None:
    ours = bytearray(2**28)
    ours[::4096] = b"x" * len(ours[::4096])
    script = (
        "from serve.contract.machine import peak_memory_mib\n"
        "before = peak_memory_mib()\n"
        "block = bytearray(100 * 2**20)\n"
        "block[::4096] = b'x' * len(block[::4096])\n"
        "print(before, peak_memory_mib() - before)"
    )
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, more = map(float, found.split())
    assert before < 200
    assert 90 < more < 130
