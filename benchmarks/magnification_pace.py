"""How many steps fit into the time that is left, from steps that are timed side by side first."""

import json
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import median

import torch

from benchmarks.jobs import Jobs, Row, starter
from benchmarks.magnification_trials import TRIALS
from train.pretraining.settings import PretrainSettings
from train.pretraining.speed import measure_speed

PACED = ("mad", "dino-mixed")
"""Trials that are timed: half of the processes each, all at once."""
_TIMED_STEPS = 20
_POLL_S = 0.2
_SPARE = 1.1
"""Real steps are slower: checkpoints, epochs, encoders that are measured meanwhile."""


def step_seconds(
    base: PretrainSettings, data: Path, folder: Path, num_processes: int, limit_s: float
) -> dict[str, float]:
    """Seconds of a step of each of `PACED` while as many processes run as later.

    Args:
        base: the preset.
        data: slides.
        folder: where each process leaves what it found.
        num_processes: how many run.
        limit_s: seconds after which those that have not ended are given up.

    Returns:
        What was found; a trial whose processes all failed is not in it.
    """
    start = time.monotonic()
    jobs = Jobs(num_processes, starter("spawn", time_steps))
    for number in range(num_processes):
        jobs.add((PACED[number % len(PACED)], number), base, data, folder)
    while not jobs.are_done:
        jobs.step()
        if time.monotonic() - start > limit_s:
            jobs.give_up()
        time.sleep(_POLL_S)
    found = {}
    for name in PACED:
        files = folder.glob(f"{name}-*.json")
        if seconds := [json.loads(file.read_text(encoding="utf-8")) for file in files]:
            found[name] = float(median(seconds))
    return found


def time_steps(row: Row, base: PretrainSettings, data: Path, folder: Path) -> None:
    """Time one process's steps; reading and training overlap, so the slower of them counts."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{row[0]}-{row[1]}.log"
    with log.open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        speed = measure_speed(TRIALS[row[0]].settings(base, row[1]), data, _TIMED_STEPS)
    seconds = max(speed.load_s, speed.step_s)
    log.with_suffix(".json").write_text(json.dumps(seconds), encoding="utf-8")


def steps_that_fit(
    rows: Sequence[Row],
    base: PretrainSettings,
    seconds: dict[str, float],
    num_processes: int,
    left_s: float,
) -> int:
    """Steps of MAD, a multiple of an epoch's, with which all rows end in the time that is left.

    Args:
        rows: what will be trained, in that order.
        base: the preset; each trial's steps are in proportion to its own.
        seconds: of a step, of each of `PACED`.
        num_processes: rows that are trained at a time.
        left_s: seconds for all of them.
    """
    ends = [0.0] * num_processes
    for name, seed in rows:
        settings = TRIALS[name].settings(base, seed)
        pace = seconds["mad" if settings.views.method == "mad" else "dino-mixed"]
        first = ends.index(min(ends))
        ends[first] += pace * settings.schedule.steps / base.schedule.steps
    epoch = base.schedule.steps_per_epoch
    return max(epoch, int(left_s / (_SPARE * max(ends)) / epoch) * epoch)
