"""The CPUs that a container may use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve.contract import cpu_quota as module
from serve.contract.cpu_quota import cpu_quota
from serve.contract.machine import usable_cpus

NONE = {"/": "max 100000"}


@pytest.fixture(autouse=True)
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(module, "_OWN", tmp_path / "own")
    return tmp_path


def limit(root: Path, own: str, limits: dict[str, str]) -> None:
    """Write the files of cgroups: which is this process's, and the limit of each."""
    (root / "own").write_text(f"1:name=systemd:/\n0::{own}\n")
    for name, text in limits.items():
        folder = root / "cgroup" / name.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.max").write_text(text + "\n")


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("/", NONE, 0),
        ("/", {"/": "400000 100000"}, 4),
        ("/", {"/": "150000 100000"}, 2),
        ("/", {"/": "10000 100000"}, 1),
        ("/a/b", {"/a": "300000 100000", "/a/b": "max 100000"}, 3),
        ("/a/b", {"/a": "300000 100000", "/a/b": "200000 100000"}, 2),
        ("/a", {"/other": "100000 100000"}, 0),
        ("/../a", {"/": "damaged"}, 0),
    ],
)
def test_the_least_quota_counts(
    own: str, limits: dict[str, str], expected: int, cgroups: Path
) -> None:
    limit(cgroups, own, limits)
    assert cpu_quota() == expected


def test_no_cgroups_are_no_limit() -> None:
    assert cpu_quota() == 0


def test_a_container_uses_no_more_cpus_than_its_quota(
    cgroups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert usable_cpus() == 64
    limit(cgroups, "/", {"/": "300000 100000"})
    assert usable_cpus() == 3
    limit(cgroups, "/", {"/": "9900000 100000"})
    assert usable_cpus() == 64


@pytest.mark.parametrize(("given", "expected"), [(None, "3"), ("5", "5")])
def test_libraries_start_as_many_threads_unless_the_user_says_otherwise(
    given: str | None, expected: str
) -> None:
    code = """if True:
        import os
        from pathlib import Path
        read = Path.read_text
        Path.read_text = lambda path, **_: (
            "300000 100000" if path.name == "cpu.max" else read(path)
        )
        import serve
        print(os.environ["OMP_NUM_THREADS"])
    """
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    if given is not None:
        environment["OMP_NUM_THREADS"] = given
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
