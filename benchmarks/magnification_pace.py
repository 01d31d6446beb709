"""How many steps fit into the time that is left, from steps that are timed side by side first."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Pace:
    """How fast pretrainings are, many at a time."""

    step_s: Mapping[str, float]
    """Seconds of a step, of each of `PACED`."""
    start_s: float
    """Seconds before a process's first step."""


def measure_pace(
    base: PretrainSettings, data: Path, folder: Path, num_processes: int, limit_s: float
) -> Pace | None:
    """Time steps while as many processes run as later.

    Args:
        base: the preset.
        data: slides.
        folder: where each process leaves what it found.
        num_processes: how many run.
        limit_s: seconds after which those that have not ended are given up.

    Returns:
        None where all processes of one of `PACED` failed.
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
    step_s, starts = {}, []
    for name in PACED:
        found = []
        for row, seconds in jobs.seconds.items():
            if row[0] == name:
                speed = json.loads(_file(folder, row).read_text(encoding="utf-8"))
                found.append(max(speed))
                starts.append(seconds - _TIMED_STEPS * sum(speed))
        if not found:
            return None
        step_s[name] = median(found)
    return Pace(step_s, max(0.0, median(starts)))


def time_steps(row: Row, base: PretrainSettings, data: Path, folder: Path) -> None:
    """Time one process's reading and steps; later they overlap, so that the slower one counts."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    path = _file(folder, row)
    log = path.with_suffix(".log")
    with log.open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        speed = measure_speed(TRIALS[row[0]].settings(base, row[1]), data, _TIMED_STEPS)
    path.write_text(json.dumps([speed.load_s, speed.step_s]), encoding="utf-8")


def _file(folder: Path, row: Row) -> Path:
    return folder / f"{row[0]}-{row[1]}.json"


def steps_that_fit(
    rows: Sequence[Row],
    base: PretrainSettings,
    pace: Pace,
    num_processes: int,
    left_s: float,
) -> int:
    """Steps of MAD, a multiple of an epoch's, with which all rows end in the time that is left.

    Args:
        rows: what will be trained, in that order.
        base: the preset; each trial's steps are in proportion to its own.
        pace: as measured.
        num_processes: rows that are trained at a time.
        left_s: seconds for all of them.
    """
    work, num_started = [0.0] * num_processes, [0] * num_processes
    for name, seed in rows:
        settings = TRIALS[name].settings(base, seed)
        step_s = pace.step_s["mad" if settings.views.method == "mad" else "dino-mixed"]
        first = work.index(min(work))
        work[first] += step_s * settings.schedule.steps / base.schedule.steps
        num_started[first] += 1
    fits = min(
        (left_s - count * pace.start_s) / (_SPARE * seconds)
        for seconds, count in zip(work, num_started, strict=True)
        if count
    )
    epoch = base.schedule.steps_per_epoch
    return max(epoch, int(fits / epoch) * epoch)
