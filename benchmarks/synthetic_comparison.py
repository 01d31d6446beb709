"""Tunes the synthetic preset on validation tiles, then compares the methods, on many cores at once.

1. Trials, side by side: the baseline with other encoders, learning rates and augmentation, one seed
   each, on half as many epochs as the comparison has. The best validation Dice decides; U-Nets are
   shown for their own sake. Where there is a GPU, every other trial runs on it, and what follows
   runs where trials took less time.
2. The comparison: as many processes of `python -m train compare` as `--processes`, which share its
   runs, until all are finished or the time is up. It has fewer epochs than asked for where the
   trials say that the time would not do.
3. The report of the seeds that are complete.

OUT/trials.csv     what was tried, its best validation Dice, seconds and device
OUT/compare/       the comparison, its report in compare/report
"""

import csv
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import tyro

ROWS = (
    *("base_without_focal", "base_with_focal", "cffa", "hcfa", "dfa", "dfa_cold", "dfa_frozen"),
    *("dfa_masks", "encoder_tiny", "encoder_tiny_conv", "unet"),
)
_NO_BIAS = ("--bias", "none")
_UNET = ("--network", "unet", "--no-exportable", "--iou-weight", "0")
_STOPS_TRIALS_S = 10.0
"""Trials are stopped so long before the end."""
_MARGIN = 1.5
"""By which a run of the comparison may take longer than a trial, per epoch (our choice)."""
_EPOCHS_MIN = 3


class Trial(NamedTuple):
    """Options of `python -m train fit synthetic` to try."""

    name: str
    options: tuple[str, ...]
    takes_part: bool = True
    """Whether the comparison may take its options."""


class TrialResult(NamedTuple):
    """What came of a trial."""

    trial: Trial
    dice: float
    """Best mean validation Dice over the epochs; NaN if it failed."""
    seconds: float
    device: str


@dataclass(kw_only=True)
class Options:
    """Tune the synthetic preset and compare the methods on it, within a number of minutes."""

    out: Path
    processes: int = 14
    """Trainings at once, each with one thread."""
    minutes: float = 5.0
    """For everything; what is not finished by then is left out."""
    epochs: int = 13
    seeds: int = 5
    rows: tuple[str, ...] = ROWS
    num_train: int = 200
    """Training tiles to draw."""

    @property
    def trial_epochs(self) -> int:
        """Half of the comparison's."""
        return max(1, self.epochs // 2)


def trials() -> tuple[Trial, ...]:
    """The preset as it is, then what may be better."""

    def one(encoder: str, rate: str, augment: str) -> Trial:
        options = ("--image-encoder", encoder, "--learning-rate", rate, "--augment", augment)
        return Trial(f"{encoder} {rate} {augment}", (*options, "--pathology-encoder-depth", "1"))

    return (
        Trial("preset", ()),
        one("tiny", "1e-3", "dihedral"),
        one("tiny_conv", "3e-4", "dihedral"),
        one("tiny_conv", "1e-3", "dihedral"),
        one("tiny_pyramid", "3e-4", "dihedral"),
        one("tiny_pyramid", "1e-3", "dihedral"),
        one("tiny_pyramid", "4e-3", "dihedral"),
        one("tiny_pyramid", "2e-3", "full"),
        Trial("unet 1e-3 dihedral", (*_UNET, "--augment", "dihedral"), takes_part=False),
        Trial("unet 1e-3 full", _UNET, takes_part=False),
    )


def main(options: Options) -> int:
    """Tune, compare and report; returns the exit status."""
    started = time.monotonic()
    ends = started + 60 * options.minutes
    data = options.out / "data"
    options.out.mkdir(parents=True, exist_ok=True)
    drawn = ("--num-train", str(options.num_train))
    _python("-m", "train", "prepare", "synthetic", str(data), *drawn, env=_device("cpu")).wait()
    results = list(_try(options, data, trials(), ends))
    _write_trials(options.out / "trials.csv", results)
    best = choose(results)
    device = faster_device(results)
    seconds = [r.seconds / options.trial_epochs for r in results if r.device == device]
    epochs = affordable_epochs(options, median(seconds), ends - time.monotonic())
    options = replace(options, epochs=epochs)
    print(
        f"chosen: {best.name} on {device}, {epochs} epochs, {time.monotonic() - started:.0f} s",
        flush=True,
    )
    command = _compare(options, data, best, options.seeds)
    running = [_python(*command, env=_device(device)) for _ in range(options.processes)]
    _wait(running, ends)
    seeds = complete_seeds(options.out / "compare" / "runs", options.rows, options.seeds)
    print(f"{seeds} of {options.seeds} seeds complete, {time.monotonic() - started:.0f} s")
    if not seeds:
        return 1
    if seeds < options.seeds:
        return _python(*_compare(options, data, best, seeds), env=_device(device)).wait()
    return 0


def choose(results: Sequence[TrialResult]) -> Trial:
    """The trial of the highest validation Dice that may take part; the preset if all failed."""
    own = [r for r in results if r.trial.takes_part and not math.isnan(r.dice)]
    return max(own, key=lambda r: r.dice).trial if own else trials()[0]


def faster_device(results: Sequence[TrialResult]) -> str:
    """Where the median trial took less time."""
    by_device: dict[str, list[float]] = {}
    for result in results:
        if not math.isnan(result.dice):
            by_device.setdefault(result.device, []).append(result.seconds)
    return min(by_device, key=lambda name: median(by_device[name]), default="cpu")


def affordable_epochs(options: Options, epoch_seconds: float, seconds_left: float) -> int:
    """Epochs with which all rows and seeds are finished in time, at most those asked for."""
    rounds = math.ceil(len(options.rows) * options.seeds / options.processes)
    affordable = seconds_left / (rounds * epoch_seconds * _MARGIN)
    return max(_EPOCHS_MIN, min(options.epochs, int(affordable)))


def complete_seeds(runs: Path, rows: Sequence[str], num_seeds: int) -> int:
    """How many seeds, from 0 on, have a finished run of every row."""
    for seed in range(num_seeds):
        if not all((runs / row / f"seed{seed}" / "leverage.json").is_file() for row in rows):
            return seed
    return num_seeds


def _try(
    options: Options, data: Path, tried: Sequence[Trial], ends: float
) -> Iterator[TrialResult]:
    """Run trials side by side, every other one on the GPU if there is one."""
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    running: dict[Trial, tuple[subprocess.Popen[bytes], str, float]] = {}
    waiting = [(trial, devices[index % len(devices)]) for index, trial in enumerate(tried)]
    while waiting or running:
        while waiting and len(running) < options.processes:
            trial, device = waiting.pop(0)
            run = options.out / "trials" / trial.name.replace(" ", "_")
            process = _python(
                *("-m", "train", "fit", "synthetic", "--data", str(data), "--out", str(run)),
                *("--epochs", str(options.trial_epochs), "--overwrite"),
                *("--precision", "bf16-mixed", *_NO_BIAS, *trial.options),
                env=_device(device),
            )
            running[trial] = process, device, time.monotonic()
        for trial, (process, device, since) in list(running.items()):
            late = time.monotonic() > ends - _STOPS_TRIALS_S
            if late:
                process.terminate()
            if process.poll() is not None or late:
                del running[trial]
                run = options.out / "trials" / trial.name.replace(" ", "_")
                yield TrialResult(trial, best_dice(run), time.monotonic() - since, device)
        time.sleep(0.2)


def best_dice(run: Path) -> float:
    """The best mean validation Dice of a run; NaN where there is none."""
    try:
        with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
            return max(float(row["validation/dice/mean"]) for row in csv.DictReader(file))
    except (OSError, ValueError, KeyError):
        return float("nan")


def _write_trials(path: Path, results: Sequence[TrialResult]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["trial", "options", "validation_dice", "seconds", "device"])
        for trial, dice, seconds, device in results:
            writer.writerow([trial.name, " ".join(trial.options), dice, f"{seconds:.1f}", device])


def _compare(options: Options, data: Path, best: Trial, seeds: int) -> tuple[str, ...]:
    return (
        *("-m", "train", "compare", "synthetic", "--data", str(data)),
        *("--out", str(options.out / "compare"), "--epochs", str(options.epochs)),
        *("--precision", "bf16-mixed", "--seeds", str(seeds), *best.options),
        *("--rows", *options.rows),
    )


def _device(name: str) -> Mapping[str, str]:
    """The environment of a training on a device, with one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return env if name == "cuda" else {**env, "CUDA_VISIBLE_DEVICES": ""}


def _python(*args: str, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, *args], env=env, stdout=subprocess.DEVNULL)


def _wait(running: Sequence["subprocess.Popen[bytes]"], ends: float) -> None:
    """Wait for all until the time is up, then stop the others."""
    while any(process.poll() is None for process in running) and time.monotonic() < ends:
        time.sleep(0.5)
    for process in running:
        process.terminate()
    for process in running:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
