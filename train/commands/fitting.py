"""The commands of one model: `fit`, `import-sampath`, `evaluate` and `predict`."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from train.commands.presets import Trains
from train.data.folder import Split, read_tile_folder
from train.errors import SettingsError
from train.files import null_for_nan, write_json


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
        """Train and print the scores of the epoch that is kept."""
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
        kept = self.settings.optimization.keep_epoch
        print_scores(card.metrics, card, f"Validation, {kept} epoch ({self.out})")

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
        if card.label_note:
            print(f"warning: {card.label_note}", file=sys.stderr)
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
            write_json(self.out, null_for_nan(found))


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
