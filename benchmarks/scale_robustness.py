"""Does a scale-robust encoder make a segmenter that holds when the stated um per pixel is wrong?

Trains the same segmenter on different pathology encoders, frozen and trained, and scores each on
test images whose um per pixel is stated as it is, at half and at double. Images are resampled to
the model's um per pixel by what is stated, so a wrong value shows the model tissue at another
scale. Repeat the command to go on.

OUT/runs/ROW/seedN/  a training run each, with scores.npz beside it
OUT/README.md, scores.csv, scale.png
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tabulate import tabulate

from benchmarks.harness import machine_line, one_line_errors
from train.comparison.bootstrap import Floats, resample_dice
from train.data.folder import TileFolder, read_tile_folder
from train.fitting.evaluation import predict_split
from train.fitting.run import fit
from train.intervals import bootstrap_interval, draw_counts
from train.metrics import class_scores, image_confusion
from train.model.checkpoint import CARD_FILE, load_checkpoint
from train.presets import PRESETS
from train.pretraining.magnification.run import named_folders
from train.settings import Settings, WeightsSettings

_RANDOM = "random"
_SCORES_FILE = "scores.npz"
_NUM_RESAMPLES = 2000
Confusion = NDArray[np.int64]
"""Pixels (factors, images, C, C) of one run, target x prediction."""


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """Train and score the rows."""

    preset: str
    """Preset of `train fit`: glas or ocelot."""
    data: Path
    """A data set that `train prepare` wrote."""
    out: Path
    encoders: tuple[str, ...] = ()
    """Pathology encoders as NAME=FOLDER; a name again is the encoder of the next seed, and the
    last one serves the seeds that are left."""
    mpp: float | None = None
    """um per pixel of the segmenter; the preset's by default."""
    tile_size_px: int | None = None
    """Its tile; the preset's by default."""
    epochs: int | None = None
    """The preset's by default."""
    factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Stated um per pixel over the true one."""
    frozen: tuple[str, ...] | None = None
    """Names of the encoders that stay frozen, the image encoder with them; by default all."""
    trained: tuple[str, ...] = ("random",)
    """Names of the encoders that are trained, the image encoder with them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Several processes may share them: the last command with all of them writes the report."""

    def settings(self, encoder: Path | None, frozen: bool, seed: int) -> Settings:
        """Of one run."""
        preset = PRESETS[self.preset]()
        model, optimization = preset.model, preset.optimization
        return replace(
            preset,
            model=replace(
                model,
                mpp=self.mpp or model.mpp,
                tile_size_px=self.tile_size_px or model.tile_size_px,
                encoders_frozen=frozen,
            ),
            weights=WeightsSettings(
                pathology_weights=None if encoder is None else str(encoder),
                random_encoders=frozen,  # the image encoder stays random, in every frozen row
            ),
            optimization=replace(
                optimization, seed=seed, epochs=self.epochs or optimization.epochs
            ),
        )


def run_robustness(study: Robustness) -> None:
    """Train what is missing, score and report.

    Raises:
        FocalPathError: a run fails.
    """
    torch.set_num_threads(1)
    folder = read_tile_folder(study.data)
    encoders: dict[str, Sequence[Path | None]] = {_RANDOM: [None], **named_folders(study.encoders)}
    found: dict[str, list[Confusion]] = {}
    for seed in study.seeds:
        for frozen in (True, False):
            names = tuple(encoders) if study.frozen is None else study.frozen
            for name in names if frozen else study.trained:
                folders = encoders[name]
                encoder = folders[min(seed, len(folders) - 1)]
                row = f"{name}, {'frozen' if frozen else 'trained'}"
                run = study.out / "runs" / row.replace(", ", "-") / f"seed{seed}"
                settings = study.settings(encoder, frozen, seed)
                found.setdefault(row, []).append(scored_run(settings, folder, run, study.factors))
                report(study, folder, found)
                print(f"{row}, seed {seed}: scored", flush=True)


def scored_run(
    settings: Settings, folder: TileFolder, run: Path, factors: Sequence[float]
) -> Confusion:
    """Train a run and score it, or take what is kept.

    Returns:
        Pixels (factors, images, C, C) of the test images, target x prediction.
    """
    kept = run / _SCORES_FILE
    if kept.is_file():
        with np.load(kept) as stored:
            if tuple(stored["factors"]) == tuple(factors):
                return np.asarray(stored["confusion"])
    run.mkdir(parents=True, exist_ok=True)
    if not (run / CARD_FILE).is_file():
        with (run / "log.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
            fit(settings, folder.root, run, overwrite=True)
    confusion = np.stack([confusion_at(run, folder, factor) for factor in factors])
    np.savez_compressed(kept, factors=np.array(factors), confusion=confusion)
    return confusion


def confusion_at(run: Path, folder: TileFolder, factor: float) -> NDArray[np.int64]:
    """Pixels (images, C, C) of the test images, their um per pixel stated `factor` times as is."""
    segmenter, card = load_checkpoint(run)
    assert all(tile.mpp is not None and tile.sides is None for tile in folder.tiles["test"])
    tiles = tuple(replace(tile, mpp=(tile.mpp or 0.0) * factor) for tile in folder.tiles["test"])
    stated = replace(folder, tiles={**folder.tiles, "test": tiles})
    images = predict_split(segmenter, card, stated, "test", tta=False)
    return np.stack(
        [image_confusion(i.predicted, i.labels, len(card.classes)).numpy() for i in images]
    )


def mean_dice(confusion: Confusion) -> float:
    """Mean over the classes of the Dice of pooled pixels, from (C, C)."""
    return class_scores(torch.from_numpy(confusion)).mean_dice


def report(study: Robustness, folder: TileFolder, found: Mapping[str, Sequence[Confusion]]) -> None:
    """Write the tables and the figure of the runs so far."""
    study.out.mkdir(parents=True, exist_ok=True)
    tiles = folder.tiles["test"]
    cases = [tile.group or tile.tile_id for tile in tiles]
    resampled = {name: resampled_dice(runs, cases) for name, runs in found.items()}
    dice = {
        name: np.array(
            [[mean_dice(run[f].sum(axis=0)) for f in range(len(study.factors))] for run in runs]
        )
        for name, runs in found.items()
    }  # seeds x factors
    num_cases = len(set(cases))
    rows = [_row(study, name, values, resampled[name], num_cases) for name, values in dice.items()]
    lines = [
        f"# Segmenters whose um per pixel is wrong: {study.preset}\n",
        f"Mean Dice of the pooled pixels of {len(tiles)} test images of {num_cases} cases, "
        "mean over seeds; the stated um per pixel is the true one times the factor. Brackets are "
        f"95% intervals of {_NUM_RESAMPLES} resamples of cases and seeds. {machine_line()}\n",
        tabulate(rows, headers="keys", tablefmt="pipe"),
        "\nDifferences, of the same seeds and cases:\n",
        tabulate(
            list(_differences(study, dice, resampled, num_cases)), headers="keys", tablefmt="pipe"
        ),
        "\n![Mean Dice over the factor](scale.png)",
        "\nLines are means over the seeds, bands their range.",
    ]
    (study.out / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_scores(study, folder, found)
    draw(study, dice, study.out / "scale.png")


def _row(
    study: Robustness, name: str, dice: Floats, resampled: Floats, num_cases: int
) -> dict[str, object]:
    """The line of an encoder: mean Dice at each factor, and what is kept of that at 1."""
    means = dict(zip(study.factors, dice.mean(axis=0), strict=True))
    return {
        "encoder": name,
        "seeds": len(dice),
        **{
            f"x {factor:g}": _text(mean, resampled[:, f], (len(dice), num_cases))
            for f, (factor, mean) in enumerate(means.items())
        },
        **{
            f"kept at x {factor:g}": f"{mean / means[1.0]:.0%}"
            for factor, mean in means.items()
            if factor != 1.0
        },
    }


def _write_scores(
    study: Robustness, folder: TileFolder, found: Mapping[str, Sequence[Confusion]]
) -> None:
    """Write Dice per class of every run and factor."""
    with (study.out / "scores.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["encoder", "seed", "factor", *(f"dice {c.name}" for c in folder.classes)])
        for name, runs in found.items():
            for seed, run in enumerate(runs):
                for f, factor in enumerate(study.factors):
                    scores = class_scores(torch.from_numpy(run[f].sum(axis=0))).dice.tolist()
                    writer.writerow([name, seed, factor, *(f"{score:.4f}" for score in scores)])


def resampled_dice(runs: Sequence[Confusion], cases: Sequence[str]) -> Floats:
    """Mean Dice of every resample of cases and seeds, (resamples, factors), paired between rows."""
    names, case = np.unique(cases, return_inverse=True)
    rng = np.random.default_rng(0)
    drawn = draw_counts(rng, len(names), _NUM_RESAMPLES)
    seeds = draw_counts(rng, len(runs), _NUM_RESAMPLES)
    of_seeds = [
        np.stack([resample_dice(at_factor, case, drawn)[:, 0] for at_factor in run], axis=1)
        for run in runs
    ]
    return np.asarray(np.einsum("rs,srf->rf", seeds / len(runs), np.stack(of_seeds)))


def _differences(
    study: Robustness,
    dice: Mapping[str, Floats],
    resampled: Mapping[str, Floats],
    num_cases: int,
) -> Iterable[dict[str, str]]:
    for ours in dice:
        for other in dice:
            same_kind = ours.split(", ")[1] == other.split(", ")[1]
            if not ours.startswith("mad") or other.startswith("mad") or not same_kind:
                continue
            if len(dice[ours]) != len(dice[other]):
                continue
            difference = dice[ours].mean(axis=0) - dice[other].mean(axis=0)
            drawn = resampled[ours] - resampled[other]
            num_drawn = len(dice[ours]), num_cases
            yield {
                "encoder": ours,
                "minus": other,
                **{
                    f"x {factor:g}": _text(difference[f], drawn[:, f], num_drawn, sign="+")
                    for f, factor in enumerate(study.factors)
                },
            }


def _text(value: float, drawn: Floats, num_drawn: Sequence[int], *, sign: str = "") -> str:
    low, high = bootstrap_interval(drawn, num_drawn)
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def draw(study: Robustness, dice: Mapping[str, Floats], path: Path) -> None:
    """Mean Dice over the factor: one panel for frozen encoders, one for trained ones."""
    figure = Figure(figsize=(8.0, 3.6), layout="constrained", dpi=120)
    kinds = [k for k in ("frozen", "trained") if any(name.endswith(k) for name in dice)]
    panels = np.atleast_1d(figure.subplots(1, len(kinds), sharey=True))
    for axes, kind in zip(panels, kinds, strict=True):
        rows = {n.split(", ")[0]: v for n, v in dice.items() if n.endswith(kind)}
        for index, (name, values) in enumerate(rows.items()):
            colour = "0.5" if name == _RANDOM else f"C{index}"
            style = "--" if name == _RANDOM else "-"
            axes.fill_between(
                study.factors,
                values.min(axis=0),
                values.max(axis=0),
                color=colour,
                alpha=0.15,
                lw=0,
            )
            axes.plot(
                study.factors, values.mean(axis=0), color=colour, ls=style, marker="o", label=name
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(study.factors, [f"{factor:g}" for factor in study.factors])
        axes.set_xlabel("stated um per pixel over the true one")
        axes.set_title(f"both encoders {kind}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("mean Dice")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    with one_line_errors():
        run_robustness(tyro.cli(Robustness, description=__doc__))
