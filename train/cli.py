"""Train and evaluate SAM-Path with Dynamic Focal Attention, and compare it with its baselines.

python -m train prepare synthetic DATA     write a data set
python -m train prepare bcss SOURCE DATA   write one from published files (also crag, bdsa)
python -m train check DATA                 validate one
python -m train fit PRESET --data DATA     train a checkpoint
python -m train import-sampath PRESET CKPT RUN --data DATA
                                           convert a SAM-Path checkpoint
python -m train evaluate RUN --data DATA   score it
python -m train compare PRESET --data DATA train and report the paper's comparison
python -m train pretrain PRESET --data SLIDES --out RUN
                                           pretrain an encoder across magnifications
python -m train magnification PRESET --data SLIDES --out OUT
                                           compare encoders across magnifications
"""

import argparse
import inspect
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Never, Union

import tyro
from filelock import FileLock
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

from train.comparison.methods import all_rows, paper_rows
from train.config import read_settings
from train.data.check import report
from train.data.convert.registry import CONVERTERS, Converter
from train.data.folder import Split, read_tile_folder
from train.data.pixels import require_trainable
from train.errors import DatasetError, FocalPathError, SettingsError
from train.files import whole_file
from train.model.class_bias import STRATEGIES
from train.pretraining.magnification.settings import EvaluationSettings
from train.pretraining.settings import PRESETS as PRETRAIN_PRESETS
from train.pretraining.settings import PretrainSettings
from train.settings import PRESETS, BiasName, Settings


class Prepare:
    """Write a data set in SAM-Path's layout."""

    converter: Converter
    out: Path
    settings: Any

    def run(self) -> None:
        """Write the data set and print what looks wrong."""
        inputs = [getattr(self, name) for name in self.converter.inputs]
        self.converter.convert(*inputs, self.out, self.settings)


def prepare_command() -> Any:
    """Build the `prepare` command from the registered converters."""
    sources = tuple(
        Annotated[_converter_command(c), tyro.conf.subcommand(c.name, description=c.help)]
        for c in CONVERTERS.values()
    )
    return Union[sources]  # noqa: UP007


def _converter_command(converter: Converter) -> type[Prepare]:
    paths = {**converter.inputs, "out": "The folder to write."}
    fields: list[tuple[str, Any]] = [
        (
            name,
            Annotated[Path, tyro.conf.arg(help=text, metavar=name.upper()), tyro.conf.Positional],
        )
        for name, text in paths.items()
    ]
    return make_dataclass(
        f"Prepare{converter.name.capitalize()}",
        [*fields, ("settings", converter.settings)],
        bases=(Prepare,),
        namespace={"converter": converter, "__doc__": converter.help},
        frozen=True,
        kw_only=True,
    )


@dataclass(frozen=True, kw_only=True)
class Check:
    """Check a data set: pixel shares of its classes, and whatever looks wrong."""

    data: tyro.conf.Positional[Path]
    """The data set: img/, mask/, folds.csv, dataset.json."""
    strict: bool = False
    """Exit with status 1 if there is a warning."""

    def run(self) -> None:
        """Print the table and the warnings.

        Raises:
            FocalPathError: `fit` would refuse the data set.
        """
        warnings = report(self.data)
        require_trainable(read_tile_folder(self.data))
        if warnings and self.strict:
            raise DatasetError(f"{self.data} has {len(warnings)} warnings, and --strict is set")


@dataclass(frozen=True, kw_only=True)
class Trains:
    """A command that takes all settings: of a preset, or of the file that --config names."""

    settings: Settings
    config: Path | None = None
    """Settings as a YAML file, such as a run's run.yaml, in place of a preset. Options change
    single values."""

    @classmethod
    def command(cls, config: Settings | None) -> type:
        """The class with a subcommand per preset, or with the settings of --config as defaults."""
        if config is not None:
            settings: tuple[Any, ...] = ("settings", Settings, field(default=config))
        else:
            defaults = {name: preset() for name, preset in PRESETS.items()}
            about = {n: (preset.__doc__ or "").splitlines()[0] for n, preset in PRESETS.items()}
            kind: Any = tyro.extras.subcommand_type_from_defaults(defaults, about)
            settings = ("settings", kind)
        name = cls.__name__
        return make_dataclass(name, [settings], bases=(cls,), frozen=True, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class Fit(Trains):
    """Train on a data set in SAM-Path's layout, starting from a preset's values."""

    data: Path
    """The data set: img/, mask/, folds.csv, dataset.json."""
    out: Path
    """The run's folder: model.safetensors, model.json, metrics.csv, training.png."""
    resume: bool = False
    """Continue the run in --out from its last epoch."""
    overwrite: bool = False
    """Replace the trained model that --out has."""
    difficulty_from: Path | None = None
    """Run of a trained baseline. `--bias hcfa` uses its per-class Dice as the difficulty."""
    folds: int | None = None
    """Cross-validate: train a model per fold, by patient, in --out/fold0 and so on, and score all
    images. Repeat the command to continue."""

    def run(self) -> None:
        """Train and print the scores of the best epoch."""
        from train.fitting.run import fit
        from train.fitting.scores import print_scores

        if self.folds is not None:
            self._cross_validate(self.folds)
            return
        card = fit(
            self.settings,
            self.data,
            self.out,
            resume=self.resume,
            overwrite=self.overwrite,
            difficulty_from=self.difficulty_from,
        )
        print_scores(card.metrics, card, f"Validation, best epoch ({self.out})")

    def _cross_validate(self, num_folds: int) -> None:
        from train.fitting.cross_validation import cross_validate, print_folds

        if self.resume or self.difficulty_from is not None:
            raise SettingsError(
                "--folds was given with --resume or --difficulty-from; expected neither. A "
                "cross-validation continues where the command is repeated, and each fold would "
                "need a baseline of its own."
            )
        print_folds(
            cross_validate(self.settings, self.data, self.out, num_folds, overwrite=self.overwrite)
        )


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Segment images of any size with a checkpoint: masks, overlays and areas."""

    checkpoint: tyro.conf.Positional[Path]
    """A run's folder or its model.safetensors."""
    images: tyro.conf.Positional[Path]
    """An image, or a folder of images."""
    out: tyro.conf.Positional[Path]
    """The folder to write: masks/, overlays/, areas.csv."""
    mpp: float | None = None
    """um per pixel of the images, where their files do not tell it."""
    tta: bool = False
    """Average over flips and quarter turns (test-time augmentation): 8 times the work."""

    def run(self) -> None:
        """Segment and write."""
        from train.fitting.predict import predict_images

        predict_images(self.checkpoint, self.images, self.out, mpp=self.mpp, tta=self.tta)


@dataclass(frozen=True, kw_only=True)
class ImportSampath(Trains):
    """Convert a SAM-Path Lightning checkpoint (late fusion, SAM ViT-B and HIPT ViT-S/16).

    The preset names the data that it was trained on: bcss, crag or bdsa.
    """

    checkpoint: tyro.conf.Positional[Path]
    """The .ckpt file."""
    out: tyro.conf.Positional[Path]
    """The run's folder to write: model.safetensors, model.json."""
    data: Path | None = None
    """The data set that it was trained on: class names, colours, mpp and pixel shares. The
    checkpoint, class names and --mpp suffice."""
    class_names: tuple[str, ...] = ()
    """Without --data: the classes in the order of their labels; by default the preset's."""
    overwrite: bool = False
    """Replace the trained model that OUT has."""
    score: bool = True
    """With --data: score the validation tiles, so that --bias hcfa can start from this run's
    Dice."""

    def run(self) -> None:
        """Convert, accounting for every weight."""
        from train.fitting.import_sampath import import_sampath
        from train.fitting.scores import print_scores

        card = import_sampath(
            self.checkpoint,
            self.out,
            self.settings,
            data=self.data,
            class_names=self.class_names,
            overwrite=self.overwrite,
            score=self.score,
        )
        names = ", ".join(entry.name for entry in card.classes)
        print(f"wrote {self.out}: {names}")
        if card.metrics:
            print_scores(card.metrics, card, f"Validation ({self.out})")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score a checkpoint on one split of a data set, and tell what its class bias does."""

    checkpoint: tyro.conf.Positional[Path]
    """A run's folder or its model.safetensors."""
    data: Path
    """The data set."""
    split: Split = "test"
    """Which images."""
    out: Path | None = None
    """Also write the scores to this JSON file."""
    tta: bool = False
    """Average over flips and quarter turns (test-time augmentation): 8 times the work. The served
    model does not, so its answers are those without."""

    def run(self) -> None:
        """Score and print."""
        from train.fitting.leverage import measure_leverage, print_leverage
        from train.fitting.scores import evaluate, print_scores
        from train.model.checkpoint import load_checkpoint

        segmenter, card = load_checkpoint(self.checkpoint)
        scores = evaluate(segmenter, card, self.data, self.split, tta=self.tta)
        print_scores(scores, card, f"{self.split.capitalize()} images of {self.data}")
        leverage = measure_leverage(segmenter, card, read_tile_folder(self.data), self.split)
        print_leverage(leverage)
        if self.out is not None:
            found = {**scores, "leverage": [asdict(entry) for entry in leverage]}
            with whole_file(self.out) as partial:
                partial.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if TYPE_CHECKING:
    PretrainPreset = PretrainSettings
else:
    PretrainPreset = tyro.extras.subcommand_type_from_defaults(
        {name: preset() for name, preset in PRETRAIN_PRESETS.items()},
        {name: (preset.__doc__ or "").splitlines()[0] for name, preset in PRETRAIN_PRESETS.items()},
    )


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pretrain a pathology encoder with Magnification-Aware Distillation, or with DINO.

    Our implementation of the published idea (arXiv 2512.14796); its masks are not read.
    """

    settings: PretrainPreset
    data: Path
    """Slides: a data set's folder with mpp in dataset.json, or OCELOT as it is published."""
    out: Path
    """The run's folder: encoder/, metrics.csv, last.ckpt, pretrain.json."""
    resume: bool = False
    """Continue the run in --out from its last epoch."""
    overwrite: bool = False
    """Replace the encoder that --out has."""

    def run(self) -> None:
        """Pretrain and say where the encoder is."""
        from train.pretraining.run import pretrain

        encoder = pretrain(
            self.settings, self.data, self.out, resume=self.resume, overwrite=self.overwrite
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
        from train.pretraining.magnification.run import compare_encoders, named_folders
        from train.pretraining.magnification.study import pretrain_methods

        given = named_folders(self.encoders)
        trained = pretrain_methods(self.settings, self.data, self.out, self.methods, self.seeds)
        report = compare_encoders(
            {**trained, **given}, self.settings, self.data, self.out / "report", self.evaluation
        )
        print(f"report: {report}")


class RowChoice(str):
    """The name of a row of the comparison."""


@dataclass(frozen=True, kw_only=True)
class Compare(Trains):
    """Train the rows of the paper's Table 1 and its ablation, and write tables and figures.

    Repeat the command to continue: finished runs are not repeated. To use several GPUs or cores,
    start the same command once for each (CUDA_VISIBLE_DEVICES=0, =1, ...): the processes share the
    runs in OUT, and each writes the report when all are finished.
    """

    data: Path
    """The data set, with test tiles."""
    out: Path
    """The folder to write: runs/ROW/seedN/ and report/README.md."""
    seeds: int = 5
    """Trainings of each row, with the seeds from --seed on. Fewer than 5 allow no verdict."""
    smallest_difference: float = 0.005
    """The smallest difference in Dice worth telling (our choice)."""
    rows: tuple[RowChoice, ...] = tuple(map(RowChoice, paper_rows()))
    """The rows to train, by default those of the paper. base_with_focal, which the others are
    compared with, is always trained."""
    pictures: bool = True
    """Show test images and predictions in the report. Terms of a data set may forbid it."""

    def run(self) -> None:
        """Train, score and report."""
        from train.comparison.compare import compare
        from train.comparison.report import write_report

        comparison = compare(
            self.settings,
            self.data,
            self.out,
            num_seeds=self.seeds,
            rows=self.rows,
            smallest_difference=self.smallest_difference,
            with_pictures=self.pictures,
        )
        with FileLock(self.out / ".report.lock"):
            print(f"report: {write_report(comparison, self.out / 'report')}")


def _registry() -> ConstructorRegistry:
    """Make the registered strategies and rows the choices of their options."""
    registry = ConstructorRegistry()

    def add(kind: object, names: Sequence[str]) -> None:
        spec = PrimitiveConstructorSpec(
            nargs=1,
            metavar="{" + ",".join(names) + "}",
            instance_from_str=lambda values: values[0],
            is_instance=lambda value: isinstance(value, str),
            str_from_instance=lambda value: [value],
            choices=tuple(names),
        )
        registry.primitive_rule(lambda info: spec if info.type is kind else None)

    add(BiasName, list(STRATEGIES))
    add(RowChoice, list(all_rows()))
    return registry


def _with_biases(command: type) -> str:
    """A command's description, and what each value of `--bias` means."""
    lines = [f"  {strategy.name}: {strategy.help}" for strategy in STRATEGIES.values()]
    return "\n".join([inspect.getdoc(command) or "", "", "Biases:", *lines])


def _commands(config: Settings | None) -> Any:
    """All subcommands; those of `prepare` are as many as there are converters now."""
    fit, compare = Fit.command(config), Compare.command(config)
    import_sampath = ImportSampath.command(config)
    return (
        Annotated[prepare_command(), tyro.conf.subcommand("prepare", description=Prepare.__doc__)]
        | Annotated[Check, tyro.conf.subcommand("check")]
        | Annotated[fit, tyro.conf.subcommand("fit", description=_with_biases(Fit))]
        | Annotated[
            import_sampath,
            tyro.conf.subcommand("import-sampath", description=inspect.getdoc(ImportSampath)),
        ]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Predict, tyro.conf.subcommand("predict")]
        | Annotated[compare, tyro.conf.subcommand("compare", description=_with_biases(Compare))]
        | Annotated[Pretrain, tyro.conf.subcommand("pretrain")]
        | Annotated[Magnification, tyro.conf.subcommand("magnification")]
    )


def _read_config(arguments: Sequence[str]) -> tuple[Settings | None, list[str]]:
    """The settings of `--config FILE`, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    found, others = parser.parse_known_args(arguments)
    return None if found.config is None else read_settings(found.config), others


class _Terminated(KeyboardInterrupt):
    """SIGTERM, handled as Ctrl-C is."""


def _terminate(*_: object) -> Never:
    raise _Terminated


def _after_interrupt(command: object) -> str:
    """What an interrupted command leaves behind, and how to continue."""
    match command:
        case Fit(out=out) | Pretrain(out=out) if (last := out / "last.ckpt").is_file():
            return f"add --resume to continue from {last}, the last finished epoch"
        case Fit() | Pretrain():
            return "no epoch was finished, so there is nothing to resume"
        case Compare():
            return "repeat the command to continue; finished runs are not repeated"
        case Prepare():
            return "a data set is written whole or not at all"
    return "repeat the command"


def main() -> None:
    """Run one command; a user's mistake ends with one line and exit status 1.

    An interrupt ends with one line and the shell's status for its signal.
    """
    config = (
        tyro.conf.OmitArgPrefixes,
        tyro.conf.OmitSubcommandPrefixes,
        tyro.conf.CascadeSubcommandArgs,
    )
    try:
        settings, arguments = _read_config(sys.argv[1:])
    except FocalPathError as error:
        sys.exit(f"error: {error}")
    command = tyro.cli(
        _commands(settings),
        args=arguments,
        prog="python -m train",
        description=__doc__.splitlines()[0],
        config=config,
        registry=_registry(),
    )
    signal.signal(signal.SIGTERM, _terminate)
    try:
        command.run()
    except FocalPathError as error:
        sys.exit(f"error: {error}")
    except (KeyboardInterrupt, SystemExit) as error:
        # Where it trains, Lightning turns an interrupt into exit status 1.
        interrupt = error if isinstance(error, KeyboardInterrupt) else error.__context__
        if not isinstance(interrupt, KeyboardInterrupt):
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"interrupted; {_after_interrupt(command)}", file=sys.stderr)
        number = signal.SIGTERM if isinstance(interrupt, _Terminated) else signal.SIGINT
        sys.exit(128 + number)


if __name__ == "__main__":
    main()
