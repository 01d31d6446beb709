"""The commands of pathology encoders: `pretrain` and `magnification`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from train.commands.presets import preset_subcommands
from train.pretraining.magnification.settings import EvaluationSettings
from train.pretraining.settings import PRESETS, PretrainSettings

if TYPE_CHECKING:
    PretrainPreset = PretrainSettings
else:
    PretrainPreset = preset_subcommands(PRESETS)


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pretrain a pathology encoder with Magnification-Aware Distillation, or with DINO.

    Our implementation of the published idea (arXiv 2512.14796); its masks are not read.
    """

    settings: PretrainPreset
    data: Path
    """Slides: a folder of whole slides, a data set's folder with mpp in dataset.json, or OCELOT as
    it is published."""
    out: Path
    """The run's folder: encoder/, metrics.csv, last.ckpt, pretrain.json."""
    folds: Path | None = None
    """A folds.csv that says which slides are for testing in place of the source's own, such as that
    of the data set that the segmenter will be trained on."""
    resume: bool = False
    """Continue the run in --out from its last epoch."""
    overwrite: bool = False
    """Replace the encoder that --out has."""
    measure_steps: int | None = None
    """Only measure how fast views are read and how fast a step is, over this many steps, and write
    nothing."""

    def run(self) -> None:
        """Pretrain and say where the encoder is."""
        from train.pretraining.run import pretrain
        from train.pretraining.speed import measure_speed

        if self.measure_steps is not None:
            print(measure_speed(self.settings, self.data, self.measure_steps, self.folds).text)
            return
        encoder = pretrain(
            self.settings,
            self.data,
            self.out,
            folds=self.folds,
            resume=self.resume,
            overwrite=self.overwrite,
        )
        print(f"encoder: {encoder}; give it to `train fit` as --pathology-weights")


@dataclass(frozen=True, kw_only=True)
class Magnification:
    """Compare encoders across magnifications, beside an untrained one.

    Pretrains --methods, each with as many student tokens as the preset, and each seed once: repeat
    the command to go on. Then probes, retrieval and segmentation at every scale, in one report.
    """

    settings: PretrainPreset
    data: Path
    """Slides with masks: a data set's folder, or OCELOT as it is published."""
    out: Path
    """The folder to write: encoders/METHOD/seedN/ and report/README.md."""
    evaluation: EvaluationSettings
    methods: tuple[str, ...] = (
        "dino-coarse",
        "dino-mixed",
        "dino-continuous",
        "mad-shuffled",
        "mad",
    )
    """What to pretrain; also dino-fine and mad-dense."""
    seeds: int = 3
    """Pretraining runs of each method."""
    encoders: tuple[str, ...] = ()
    """Others to measure, as NAME=FOLDER, such as mine=runs/mad/encoder."""

    def run(self) -> None:
        """Pretrain what is missing, measure and report."""
        from train.pretraining.magnification.run import (
            check_study,
            compare_encoders,
            named_folders,
        )
        from train.pretraining.magnification.study import pretrain_methods

        given = named_folders(self.encoders, self.methods)
        check_study(given, self.settings, self.data, self.evaluation)
        trained = pretrain_methods(self.settings, self.data, self.out, self.methods, self.seeds)
        report = compare_encoders(
            {**trained, **given}, self.settings, self.data, self.out / "report", self.evaluation
        )
        print(f"report: {report}")
