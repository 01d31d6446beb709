"""Slides on real Ray clusters of two nodes, with workers and nodes killed."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.cli import main
from serve.slides.finish import read_passport
from serve.slides.status import read_status, verify
from serve.slides.store import WorkFolder
from tests.support.ray_cluster import (
    NoNamespacesError,
    RayCluster,
    in_namespaces,
    side_by_side,
)
from tests.support.slide_runs import files_of
from tests.support.slides import tissue_pixels, write_aperio
from tests.support.toy_bundle import write_toy_bundle

pytest.importorskip("ray", reason="the extra `cluster` is not installed")

from tests.support.slow_cluster_run import HOLD_FILE

pytestmark = [pytest.mark.ray, pytest.mark.slow]

_SETTINGS = ("--threads", "1", "--block-cells", "64", "--format", "ome-zarr", "geojson")
_DEADLINE_S = 240


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("bundle") / "toy", tile_size_px=64)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("slides")
    return {
        "large": write_aperio(folder / "large.svs", tissue_pixels(1200, 1400)),
        "small": write_aperio(folder / "small.svs", tissue_pixels(300, 400)),
        "poison": write_aperio(folder / "poison.svs", tissue_pixels(200, 200)),
    }


@pytest.fixture(scope="module")
def expected(
    slides: dict[str, Path], bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What one process makes of the slides."""
    out = tmp_path_factory.mktemp("expected") / "out"
    command = ["slides", "run", *map(str, slides.values()), "--bundle", str(bundle)]
    assert main([*command, "--out", str(out), "--progress", "quiet", *_SETTINGS]) == 0
    return out


def command_line(cluster: RayCluster, bundle: Path, out: Path, *slides: Path) -> list[str]:
    return [
        *("slides", "run", *map(str, slides), "--bundle", str(bundle), "--out", str(out)),
        *("--cluster", cluster.address, "--worker-cpus", "1", "--progress", "json", *_SETTINGS),
    ]


def wait_for(process: "subprocess.Popen[bytes]", condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():
        assert process.poll() is None, "the run ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def hosts_of(work: WorkFolder) -> set[str]:
    """The machines that have computed blocks."""
    return {record.host.rpartition(" ")[2] for record in work.records().values()}


def hold_from(folder: Path, num_blocks: int) -> None:
    """Let the run beside go on until so many blocks are done; see `slow_cluster_run`."""
    (folder / "next").write_text(str(num_blocks))
    (folder / "next").rename(folder / HOLD_FILE)


def kill_worker_and_node(
    cluster: RayCluster, work: WorkFolder, process: "subprocess.Popen[bytes]", folder: Path
) -> None:
    wait_for(process, lambda: bool(cluster.workers()))
    before = work.num_done()
    os.kill(cluster.workers()[0].pid, signal.SIGKILL)
    hold_from(folder, before + 1)
    wait_for(process, lambda: work.num_done() > before)
    cluster.kill_node(1)
    assert work.num_done() < 25, "too little was left to do"
    (folder / HOLD_FILE).unlink()


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[RayCluster]:
    """In network namespaces, or where those cannot be made side by side on this machine."""
    with contextlib.ExitStack() as stack:
        try:
            cluster = stack.enter_context(in_namespaces(folder))
        except NoNamespacesError:
            cluster = stack.enter_context(side_by_side(folder))
        yield cluster


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    with two_nodes(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def refused(
    nodes: RayCluster, slides: dict[str, Path], bundle: Path, tmp_path_factory: Any
) -> "tuple[subprocess.Popen[bytes], Path]":
    """A run with another token, started early: Ray tries for 20 seconds."""
    folder = tmp_path_factory.mktemp("refused")
    other = dataclasses.replace(
        nodes, environment={**nodes.environment, "RAY_AUTH_TOKEN": "0" * 64}
    )
    arguments = command_line(other, bundle, folder / "out", slides["small"])
    return other.start("-m", "serve", *arguments, log=folder / "run.log"), folder


def test_a_run_that_is_told_to_end_does_so_without_a_word(
    nodes: RayCluster, slides: dict[str, Path], bundle: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "run.log"
    arguments = command_line(nodes, bundle, out, slides["small"])
    hold_from(tmp_path, 1)
    process = nodes.start("-m", "tests.support.slow_cluster_run", *arguments, log=log)
    wait_for(process, lambda: (out / ".work" / "small" / "plan.json").is_file())
    process.send_signal(signal.SIGTERM)
    assert process.wait(_DEADLINE_S) == 143
    assert [line for line in log.read_text().splitlines() if not line.startswith("{")] == []


@pytest.mark.usefixtures("refused")
def test_a_slide_that_kills_its_workers_fails_alone_after_three_tries(
    nodes: RayCluster, slides: dict[str, Path], bundle: Path, expected: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "run.log"
    arguments = command_line(nodes, bundle, out, slides["poison"], slides["small"])
    process = nodes.start("-m", "tests.support.slow_cluster_run", *arguments, log=log)
    assert process.wait(_DEADLINE_S) == 1, log.read_text()
    told = log.read_text()
    events = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    ended = {event["slide"]: event for event in events if event["event"] == "end"}
    assert (ended["poison"]["status"], ended["poison"]["code"]) == ("failed", "worker_died")
    assert (out / ".work" / "poison" / "tries").read_text() == "tried\n" * 3
    assert told.count("error: ") == 1
    assert "Traceback" not in told
    assert files_of(out / "small") == files_of(expected / "small")
    assert {slide.name: slide.state for slide in read_status(out)} == {
        "small": "done",
        "poison": "failed",
    }


# Last of those that use the nodes: one of them is gone afterwards.
def test_a_killed_worker_and_a_killed_node_change_no_byte(
    nodes: RayCluster, slides: dict[str, Path], bundle: Path, expected: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "run.log"
    arguments = command_line(nodes, bundle, out, slides["large"])
    hold_from(tmp_path, 1)
    process = nodes.start("-m", "tests.support.slow_cluster_run", *arguments, log=log)
    work = WorkFolder(out / ".work" / "large")
    wait_for(process, lambda: hosts_of(work) == nodes.addresses)
    kill_worker_and_node(nodes, work, process, tmp_path)
    assert process.wait(_DEADLINE_S) == 0, log.read_text()
    told = log.read_text()
    events = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    assert "Traceback" not in told
    assert sum("died" in event["text"] for event in events if event["event"] == "note") >= 1
    assert all(event["tiles_done"] <= event["tiles"] for event in events if "tiles" in event)
    assert files_of(out / "large") == files_of(expected / "large")
    assert verify(out / "large")
    passport = read_passport(out / "large")
    assert {host.rpartition(" ")[2] for host in passport.hosts} == nodes.addresses


def test_another_token_is_refused_in_one_line(
    refused: "tuple[subprocess.Popen[bytes], Path]",
) -> None:
    process, folder = refused
    assert process.wait(_DEADLINE_S) == 1
    (line,) = (folder / "run.log").read_text().splitlines()
    assert "RAY_AUTH_TOKEN" in line
    assert not (folder / "out").exists()
