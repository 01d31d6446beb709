"""Shards as an array of jobs runs them: processes that are killed at any moment and start again."""

import json
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess as Process
from pathlib import Path

import pytest

from serve.cli import main
from serve.slides.status import read_status, verify
from tests.support.slide_runs import files_of
from tests.support.slides import tissue_pixels, write_aperio
from tests.support.toy_bundle import write_toy_bundle

pytestmark = pytest.mark.slow

_SHARDS, _AT_ONCE, _KILLS = 8, 3, 10
_DEADLINE_S = 270


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def run_logged(words: Sequence[str], log: Path) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(main(list(words)))


def test_eight_shards_that_are_killed_at_random_do_each_slide_once(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle", tile_size_px=64)
    slides = tmp_path / "slides"
    slides.mkdir()
    for number in range(11):
        pixels = tissue_pixels(500, 400 + 20 * number, seed=number)
        write_aperio(slides / f"slide{number:02}.svs", pixels)
    out, whole = tmp_path / "out", tmp_path / "whole"
    command = ["slides", "run", str(slides), "--bundle", str(bundle), "--threads", "1"]
    command += ["--block-cells", "32", "--format", "ome-zarr", "geojson", "--out"]
    logs = {shard: tmp_path / f"{shard}.log" for shard in range(_SHARDS)}
    # Forked off a process that has imported everything: starting takes no time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["onnxruntime", "tests.serve.slides.test_shards_killed"])

    def start(shard: int) -> Process:
        words = (*command, str(out), "--shard", f"{shard}/{_SHARDS}", "--progress", "json")
        process = context.Process(target=run_logged, args=(words, logs[shard]))
        process.start()
        return process

    chance = random.Random(1)
    waiting, running, kills = list(range(_SHARDS)), dict[int, Process](), 0
    deadline = time.monotonic() + _DEADLINE_S
    try:
        while waiting or running:
            assert time.monotonic() < deadline
            while waiting and len(running) < _AT_ONCE:
                shard = waiting.pop(0)
                running[shard] = start(shard)
            time.sleep(chance.uniform(0.05, 0.4))
            begun = [shard for shard in running if size_of(logs[shard])]
            if begun and kills < _KILLS:  # in the middle of its slides, mostly
                running[chance.choice(begun)].kill()
                kills += 1
            for shard, process in list(running.items()):
                if process.exitcode is not None:
                    del running[shard]
                    if process.exitcode != 0:
                        waiting.append(shard)
    finally:
        for process in running.values():
            process.kill()
            process.join()
    assert kills > 0

    done, shard_of = Counter[str](), dict[str, int]()
    for shard, log in logs.items():
        for line in log.read_text().splitlines():
            event = json.loads(line)
            name = event.get("slide") or event["name"]
            assert shard_of.setdefault(name, shard) == shard
            done[name] += event.get("status") == "done"
    assert len(shard_of) == 11
    assert max(done.values()) == 1
    assert main([*command, str(whole), "--progress", "quiet"]) == 0
    for name in shard_of:
        assert verify(out / name)
        assert files_of(out / name) == files_of(whole / name)
    assert (out / "summary.csv").read_bytes() == (whole / "summary.csv").read_bytes()
    assert {slide.state for slide in read_status(out)} == {"done"}
    assert not [path for path in out.rglob("*") if path.name.endswith(".partial")]
