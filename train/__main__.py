"""Train and evaluate segmentation models that learn which tissue classes are hard.

python -m train prepare synthetic DATA     write a data set
python -m train fit PRESET --data DATA     train a checkpoint
python -m train evaluate RUN --data DATA   score it
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from train.dataset import Split
from train.errors import FocalPathError
from train.settings import PRESETS, Settings
from train.synthetic import SyntheticSettings, write_dataset


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Write a data set in SAM-Path's layout."""

    source: tyro.conf.Positional[Literal["synthetic"]]
    """synthetic: H&E tissue drawn by `train.synthetic`."""
    out: tyro.conf.Positional[Path]
    """The folder to write."""
    synthetic: SyntheticSettings

    def run(self) -> None:
        """Write it, unless it is there already."""
        write_dataset(self.out, self.synthetic)


if TYPE_CHECKING:
    Preset = Settings
else:
    Preset = tyro.extras.subcommand_type_from_defaults(
        {name: preset() for name, preset in PRESETS.items()},
        {name: (preset.__doc__ or "").splitlines()[0] for name, preset in PRESETS.items()},
    )


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Train on a data set in SAM-Path's layout, starting from a preset's values."""

    settings: Preset
    data: Path
    """The data set: img/, mask/, folds.csv, dataset.json."""
    out: Path
    """The run's folder: model.safetensors, model.json, metrics.csv, training.png."""
    resume: bool = False
    """Continue the run in --out from its last epoch."""

    def run(self) -> None:
        """Train and print the scores of the best epoch."""
        from train.fit import fit, print_scores

        card = fit(self.settings, self.data, self.out, resume=self.resume)
        print_scores(card.metrics, card, f"Validation, best epoch ({self.out})")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score a checkpoint on one split of a data set."""

    checkpoint: tyro.conf.Positional[Path]
    """A run's folder or its model.safetensors."""
    data: Path
    """The data set."""
    split: Split = "test"
    """Which tiles."""
    out: Path | None = None
    """Write the scores to this JSON file, too."""

    def run(self) -> None:
        """Score and print."""
        from train.checkpoint import load_checkpoint
        from train.fit import evaluate, print_scores

        segmenter, card = load_checkpoint(self.checkpoint)
        scores = evaluate(segmenter, card, self.data, self.split)
        print_scores(scores, card, f"{self.split.capitalize()} tiles of {self.data}")
        if self.out is not None:
            self.out.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


Command = (
    Annotated[Prepare, tyro.conf.subcommand("prepare")]
    | Annotated[Fit, tyro.conf.subcommand("fit")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
)


def main() -> None:
    """Run one command; a user's mistake ends with one line and exit status 1."""
    config = (
        tyro.conf.OmitArgPrefixes,
        tyro.conf.OmitSubcommandPrefixes,
        tyro.conf.CascadeSubcommandArgs,
    )
    command = tyro.cli(Command, prog="python -m train", description=__doc__, config=config)
    try:
        command.run()
    except FocalPathError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
