"""Ctrl-C of `focalpath-segment`: real signals to a real process."""

import csv
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serve.client.interrupts import second_interrupt_ends
from tests.support.pictures import blobs, encoded

pytestmark = pytest.mark.slow

DEADLINE_S = 60
COMMAND = """
import sys
from serve.answers.format import AnswerFormat
from serve.client import segment_files
from serve.inference.segmenter import TileSegmenter

segment, blocks = TileSegmenter.segment, AnswerFormat.blocks

def say(what):
    print(what, flush=True)

def segment_until_told(self, image, **options):
    if image.shape[0] == 50:
        say("segmenting")
        sys.stdin.readline()
    return segment(self, image, **options)

def half_until_told(entry, source, values):
    content = b"".join(blocks(entry, source, values))
    yield content[:100]
    if entry.name == "overlay" and source.name == "slow.png":
        say("writing")
        sys.stdin.readline()
    yield content[100:]

slow = sys.argv.pop(1)
if slow == "segmenting":
    TileSegmenter.segment = segment_until_told
else:
    AnswerFormat.blocks = half_until_told
sys.exit(segment_files.main(sys.argv[1:]))
"""
"""The command line, with an image `slow` of which one step waits for a line on standard input."""

DEAF = """
import signal
import threading
import time
from serve.client.interrupts import second_interrupt_ends
from serve.contract.interrupts import safe_interrupts

def wait_for_ever():
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # another thread receives it
    lock = threading.Lock()
    lock.acquire()
    print("waiting", flush=True)
    lock.acquire()

with safe_interrupts(), second_interrupt_ends():
    try:
        wait_for_ever()
    except KeyboardInterrupt:
        wait_for_ever()
"""
"""A main thread that waits for a lock, and that no SIGINT wakes."""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@contextmanager
def _segmenting(
    slow: str, bundle: Path, folder: Path, out: Path
) -> Iterator[subprocess.Popen[str]]:
    """The command at work on the first of two images, until `slow` waits."""
    images = folder / "slow.png", folder / "other.png"
    images[0].write_bytes(encoded(blobs(50, 60)))
    images[1].write_bytes(encoded(blobs(70, 60)))
    options = ("--bundle", bundle, "--out", out, "--jobs", "1")
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, slow, *map(str, (*images, *options))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{slow}\n"
            yield process
        finally:
            process.kill()


def _interrupt(process: subprocess.Popen[str]) -> str:
    """Send a first Ctrl-C, and return what the command says to it."""
    assert process.stderr is not None
    process.send_signal(signal.SIGINT)
    return process.stderr.readline()


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def test_the_first_ctrl_c_finishes_the_image_under_way_and_says_so(
    toy_bundle: Path, out: Path, tmp_path: Path
) -> None:
    with _segmenting("segmenting", toy_bundle, tmp_path, out) as process:
        told = _interrupt(process)
        assert str(tmp_path / "slow.png") in told
        assert "other.png" not in told
        _, rest = process.communicate("go on\n", timeout=DEADLINE_S)
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert _names(out) == {"slow.labels.png", "slow.overlay.png", "slow.json", "summary.csv"}
    with (out / "summary.csv").open(newline="") as file:
        assert {row["image"] for row in csv.DictReader(file)} == {"slow.png"}


@pytest.mark.parametrize("slow", ["segmenting", "writing"])
def test_the_second_ctrl_c_ends_at_once_and_leaves_nothing_half_written(
    slow: str, toy_bundle: Path, out: Path, tmp_path: Path
) -> None:
    out.mkdir()
    with _segmenting(slow, toy_bundle, tmp_path, out) as process:
        _interrupt(process)
        process.send_signal(signal.SIGINT)
        process.wait(DEADLINE_S)  # nothing tells the slow step to go on
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 130
    assert _names(out) == set()


def test_an_older_result_survives_the_second_ctrl_c(
    toy_bundle: Path, out: Path, tmp_path: Path
) -> None:
    out.mkdir()
    older = encoded(np.zeros((5, 5, 3), np.uint8))
    (out / "slow.overlay.png").write_bytes(older)
    (out / "slow.json").write_text('{"model": {}, "image": {}, "classes": []}')
    with _segmenting("writing", toy_bundle, tmp_path, out) as process:
        _interrupt(process)
        process.send_signal(signal.SIGINT)
        process.wait(DEADLINE_S)
    assert _names(out) == {"slow.overlay.png", "slow.json"}
    with Image.open(out / "slow.overlay.png") as kept:
        assert kept.size == (5, 5)


def test_both_wake_a_main_thread_that_did_not_receive_the_signal() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            for _ in range(2):
                assert process.stdout.readline() == "waiting\n"
                process.send_signal(signal.SIGINT)
            process.wait(DEADLINE_S)
        finally:
            process.kill()
    assert process.returncode == 130


def test_ctrl_c_is_as_before_after_the_work_and_in_other_threads() -> None:
    def handler() -> object:
        with second_interrupt_ends():
            return signal.getsignal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(handler).result() is before
    assert handler() is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_that_is_ignored_stays_ignored(toy_bundle: Path, out: Path, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for `command &`
    try:
        with _segmenting("segmenting", toy_bundle, tmp_path, out) as process:
            process.send_signal(signal.SIGINT)
            process.communicate("go on\n", timeout=DEADLINE_S)
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.returncode == 0
