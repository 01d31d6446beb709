"""Run a study of encoders across magnifications on one machine, many pretrainings at once.

`train magnification` trains one encoder after the other. Encoders of this size leave most of a GPU
idle, so here several share it, each in a process of its own. A run that fails or does not end in
time is left out, and the report says how many seeds each row has. Repeat the command to go on (not
with --seconds, which then fits the number of steps again).

OUT/slides/          drawn slides, unless --data names others
OUT/encoders/        a pretraining run per trial and seed
OUT/measured/        what was measured of each
OUT/report/          the compared methods; OUT/variations/: one setting changed at a time
OUT/pretraining.csv  losses and signs of collapse per epoch; OUT/times.json: seconds and machine
"""

import csv
import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import tyro

from benchmarks.harness import machine_line, one_line_errors
from benchmarks.jobs import Jobs, Row, starter
from benchmarks.magnification_pace import measure_pace, steps_that_fit
from benchmarks.magnification_trials import COMPARED, TRIALS, VARIATIONS
from serve.contract.machine import usable_cpus
from train.data.synthetic.slides import SlideSettings, write_slides
from train.errors import SettingsError
from train.fitting.metrics_file import METRICS_FILE, read_metrics
from train.pretraining.encoder import create_encoder
from train.pretraining.magnification.evaluate import EncoderResult, Evaluation
from train.pretraining.magnification.labelled import open_labelled
from train.pretraining.magnification.measured import measured_once
from train.pretraining.magnification.report import write_report
from train.pretraining.magnification.run import RANDOM, open_encoder
from train.pretraining.magnification.settings import EvaluationSettings
from train.pretraining.run import ENCODER_FOLDER, LAST_FILE, pretrain
from train.pretraining.settings import PRESETS, PretrainSettings

_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Study:
    """Pretrain and measure many encoders at once."""

    out: Path
    """Where everything is written."""
    preset: str = "synthetic"
    """Preset of `train pretrain`."""
    data: Path | None = None
    """Slides with masks; drawn where none is given."""
    slides: SlideSettings = field(default_factory=SlideSettings)
    """What to draw."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    steps: int = 1000
    """Steps of MAD; DINO's have half as many tokens, so it takes twice as many."""
    steps_per_epoch: int = 100
    batch_size: int = 32
    learning_rate: float | None = None
    """Learning rate of every trial that names none; the preset's where none is given."""
    precision: str = "bf16-mixed"
    num_workers: int = 1
    """Reading processes of each pretraining."""
    compared: tuple[str, ...] = tuple(trial.name for trial in COMPARED)
    """Trials with all seeds."""
    variations: tuple[str, ...] = tuple(trial.name for trial in VARIATIONS)
    """Trials with one seed."""
    seeds: int = 3
    processes: int = max(1, usable_cpus() // 2)
    """Pretrainings at a time: each reads in a process of its own, too."""
    measuring: int = max(1, usable_cpus() // 2)
    """Encoders measured at a time."""
    seconds: float | None = None
    """End after so many seconds: --steps is fitted to them, and pretrainings that have not ended
    in time are given up."""
    reserve_s: float = 60.0
    """Of these, what is kept for the last measurements and the report."""

    def left_s(self, start: float) -> float:
        """Seconds that are left for pretraining; `start` is the clock's time at the start."""
        if self.seconds is None:
            return float("inf")
        return self.seconds - self.reserve_s - (time.monotonic() - start)

    def base(self) -> PretrainSettings:
        """The preset with this study's schedule."""
        preset = PRESETS[self.preset]()
        schedule = replace(
            preset.schedule,
            steps=self.steps,
            steps_per_epoch=self.steps_per_epoch,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate or preset.schedule.learning_rate,
            precision=self.precision,  # type: ignore[arg-type]
            num_workers=self.num_workers,
        )
        return replace(preset, schedule=schedule)

    def run_of(self, row: Row) -> Path:
        """The folder of one pretraining."""
        return self.out / "encoders" / row[0] / f"seed{row[1]}"

    def encoder_of(self, row: Row) -> Path:
        """The folder of its encoder."""
        return self.run_of(row) / ENCODER_FOLDER

    def measured(self, row: Row, evaluation: Evaluation) -> EncoderResult:
        """Measure an encoder, or read what was measured of it."""
        if row[0] == RANDOM:
            torch.manual_seed(row[1])
            encoder = create_encoder(self.base())
        else:
            encoder = open_encoder(self.encoder_of(row))
        return measured_once(evaluation, encoder, self.measured_file(row))

    def measured_file(self, row: Row) -> Path:
        """What was measured of one encoder."""
        return self.out / "measured" / row[0] / f"seed{row[1]}.json"

    def rows(self) -> list[Row]:
        """Trials and seeds, the most important first."""
        first = [(name, seed) for seed in range(self.seeds) for name in self.compared]
        # Those that take longer come first, so that none ends long after the others.
        return sorted(
            [*first, *((name, 0) for name in self.variations)],
            key=lambda row: TRIALS[row[0]].steps_factor == 1,
        )


def run_study(study: Study) -> None:
    """Draw, pretrain, measure and report.

    Raises:
        FocalPathError: the data cannot be used, or --seconds are too few.
    """
    start = time.monotonic()
    torch.set_num_threads(1)
    study.out.mkdir(parents=True, exist_ok=True)
    data = study.data
    if data is None:
        data = study.out / "slides"
        pool = ProcessPoolExecutor(usable_cpus(), multiprocessing.get_context("spawn"))
        write_slides(data, study.slides, pool)
        _tell(start, "slides drawn")
    if study.seconds is not None:
        study = fitted(study, data, start)
    trainings = Jobs(study.processes, starter("spawn", pretrain_row))
    for name, seed in study.rows():
        trainings.add((name, seed), study, data)
    trainings.step()
    evaluation = Evaluation(open_labelled(data), study.evaluation)
    _tell(start, "tiles read")
    # Forked, so that the tiles are there already; this process never touches the GPU.
    measurements = Jobs(study.measuring, starter("fork", measure_row))
    for seed in range(study.seeds):
        measurements.add((RANDOM, seed), study, evaluation)
    while not (trainings.are_done and measurements.are_done):
        for row in trainings.step():
            _tell(start, f"{row[0]}, seed {row[1]}: pretrained")
            measurements.add(row, study, evaluation)
        for row in measurements.step():
            _tell(start, f"{row[0]}, seed {row[1]}: measured")
        if study.left_s(start) < 0:
            trainings.give_up()
        time.sleep(_POLL_S)
    report(study, evaluation)
    write_times(study, trainings.seconds, time.monotonic() - start)
    _tell(start, "reported")


def fitted(study: Study, data: Path, start: float) -> Study:
    """The study with as many steps as fit into its time.

    Raises:
        SettingsError: steps take so long that they could not even be timed.
    """
    limit_s = study.left_s(start) / 3
    base = study.base()
    pace = measure_pace(base, data, study.out / "pace", study.processes, limit_s)
    if pace is None:
        raise SettingsError(
            f"{study.processes} pretrainings at a time did not end a few steps in {limit_s:.0f} s; "
            f"expected fewer at a time (--processes) on {usable_cpus()} CPUs, or more --seconds"
        )
    steps = steps_that_fit(study.rows(), base, pace, study.processes, study.left_s(start))
    _tell(start, f"{pace}; {steps} steps fit")
    return replace(study, steps=steps)


def write_times(study: Study, seconds: Mapping[Row, float], study_s: float) -> None:
    """Write what ran, where, and how long it took."""
    settings = {**asdict(study), "out": None, "data": None}
    times = {
        "machine": machine_line(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "study_s": round(study_s, 1),
        "pretraining_s": {f"{name}:{seed}": found for (name, seed), found in seconds.items()},
        "study": settings,
    }
    (study.out / "times.json").write_text(json.dumps(times, indent=2) + "\n", encoding="utf-8")


def pretrain_row(row: Row, study: Study, data: Path) -> None:
    """Pretrain one encoder, or continue; does nothing if it is there."""
    torch.set_num_threads(1)
    run = study.run_of(row)
    run.mkdir(parents=True, exist_ok=True)
    if study.encoder_of(row).is_dir():
        return
    base = study.base()
    settings = TRIALS[row[0]].settings(base, base.schedule.seed + row[1])
    with (run / "log.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        pretrain(settings, data, run, resume=(run / LAST_FILE).is_file())


def measure_row(row: Row, study: Study, evaluation: Evaluation) -> None:
    """Measure one encoder and keep what was found."""
    study.measured(row, evaluation)


def _results(
    study: Study, evaluation: Evaluation, names: Sequence[str]
) -> dict[str, list[EncoderResult]]:
    """What was measured, without the rows that failed."""
    results: dict[str, list[EncoderResult]] = {}
    for name in names:
        for seed in range(study.seeds):
            row = (name, seed)
            if study.measured_file(row).is_file():
                results.setdefault(name, []).append(study.measured(row, evaluation))
    return results


def report(study: Study, evaluation: Evaluation) -> None:
    """Write the two reports and pretraining.csv of what there is."""
    reports = {
        "report": (RANDOM, *study.compared),
        "variations": (RANDOM, "mad", *study.variations),
    }
    for folder, names in reports.items():
        if results := _results(study, evaluation, names):
            write_report(
                results,
                study.evaluation,
                evaluation.num_classes,
                len(evaluation.bootstrap.cases),
                study.out / folder,
            )
    kept = ("context", "alignment", "spread", "entropy_of_mean", "mean_entropy", "rank")
    with (study.out / "pretraining.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("encoder", "seed", "steps", *kept), lineterminator="\n")
        writer.writeheader()
        for row in study.rows():
            writer.writerows(_epochs(study, row, kept))


def _epochs(study: Study, row: Row, kept: Sequence[str]) -> list[dict[str, object]]:
    """One line per epoch of a pretraining; none where it has no metrics."""
    metrics = study.run_of(row) / METRICS_FILE
    if not metrics.is_file():
        return []
    return [
        {
            "encoder": row[0],
            "seed": row[1],
            "steps": int(values["epoch"]) * study.steps_per_epoch,
            **{key: f"{float(values[key]):.4f}" for key in kept if values.get(key)},
        }
        for values in read_metrics(metrics)
    ]


def _tell(start: float, text: str) -> None:
    print(f"{time.monotonic() - start:6.1f} s  {text}", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        run_study(tyro.cli(Study, description=__doc__))
