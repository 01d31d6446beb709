"""k-fold cross-validation by group: a model per fold, and scores of all images pooled.

RUN/fold0/, RUN/fold1/ ...   a training run each (see `train.fitting.run`), validated on its fold
RUN/folds.json               scores of each fold, pooled scores, mean and standard deviation
RUN/folds.csv                the fold of each image

Test images (fold -1) are left out. The epoch of each model is chosen on the fold that it is scored
on, so the scores are slightly too good. Those of `train evaluate` on test images are not.
"""

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from train.console import warn
from train.data.convert.layout import TEST_FOLD, assign_folds
from train.data.folder import Split, Tile, TileFolder, read_tile_folder
from train.data.folds import folds_file, read_folds
from train.data.pixels import count_all, require_trainable
from train.errors import DatasetError, RunError, SettingsError
from train.files import null_for_nan, whole_file, write_errors_explained, write_json
from train.fitting.evaluation import count_split
from train.fitting.resume import Inputs, changed_inputs, run_inputs
from train.fitting.run import LAST_FILE, fit
from train.fitting.run_lock import only_run
from train.fitting.task import named_scores
from train.metrics import class_scores
from train.model.checkpoint import load_checkpoint, read_card
from train.settings import LabelClass, Settings

_DONE_FILE = "cross_validation.json"


@dataclass(frozen=True)
class CrossValidation:
    """What came of it."""

    classes: tuple[LabelClass, ...]
    folds: tuple[dict[str, float], ...]
    """Scores of each fold, under names such as `dice/mean`."""
    pooled: dict[str, float]
    """Scores of the pixels of all folds together."""

    def spread(self, name: str) -> tuple[float, float]:
        """Mean and standard deviation of a score over the folds, without those that lack it."""
        values = np.array([scores[name] for scores in self.folds])
        values = values[~np.isnan(values)]
        if not len(values):
            return float("nan"), float("nan")
        return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0


def cross_validate(
    settings: Settings, data: Path, run: Path, num_folds: int, *, overwrite: bool = False
) -> CrossValidation:
    """Train and score one model per fold. Repeat the call to continue: finished folds are kept.

    Args:
        settings: The whole configuration, the same for all folds.
        data: A data set in SAM-Path's layout; images with the same `group` in folds.csv stay
            together.
        run: The folder to write.
        num_folds: How many models.
        overwrite: Train finished folds again.

    Raises:
        SettingsError: there are fewer than two folds.
        DatasetError: there are fewer groups than folds, or a fold cannot be trained on.
        RunError: a fold was trained with other settings, or another process trains there.
    """
    if num_folds < 2:
        raise SettingsError(f"--folds is {num_folds}; expected 2 or more")
    folder = read_tile_folder(data)
    folds = assign(folder, num_folds, settings.optimization.seed)
    parts = [_part(folder, folds, fold) for fold in range(num_folds)]
    _require_trainable(folder, parts)
    if settings.weights.from_run is not None:
        _warn_of_start(Path(settings.weights.from_run))
    is_first = bool(_is_first())
    with write_errors_explained(run):
        run.mkdir(parents=True, exist_ok=True)
        with only_run(run, is_first=is_first):
            if is_first and overwrite:
                _forget(run)
            return _all_folds(settings, folder, folds, parts, run, overwrite=overwrite)


@rank_zero_only
def _is_first() -> bool:
    """Whether this process is the first of those that train together."""
    return LightningEnvironment().node_rank() == 0  # before a trainer, each node has a rank 0


def _all_folds(
    settings: Settings,
    folder: TileFolder,
    folds: dict[str, int],
    parts: Sequence[TileFolder],
    run: Path,
    *,
    overwrite: bool,
) -> CrossValidation:
    """Train the folds that are not finished, and score all."""
    runs = [run / f"fold{number}" for number in range(len(parts))]
    inputs = [run_inputs(settings, part, None) for part in parts]
    # With `overwrite` no file decides: processes that start together may look before rank 0 has
    # removed them.
    done = [
        None if overwrite else _read_done(each, known)
        for each, known in zip(runs, inputs, strict=True)
    ]
    _write_assignment(run / "folds.csv", folds)
    confusions = [
        _fold(settings, part, each, known, overwrite=overwrite) if found is None else found
        for part, each, known, found in zip(parts, runs, inputs, done, strict=True)
    ]
    if len({read_card(each).origins for each in runs}) > 1:
        warn(
            f"the folds in {run} started from different weights, which were replaced meanwhile; "
            "their scores are of different models. Train all of them again with --overwrite"
        )
    scores = [named_scores(class_scores(torch.as_tensor(c)), folder.classes) for c in confusions]
    total = torch.as_tensor(np.sum(confusions, axis=0))
    pooled = named_scores(class_scores(total), folder.classes)
    result = CrossValidation(folder.classes, tuple(scores), pooled)
    spreads = {name: result.spread(name) for name in pooled}
    content = {
        "classes": [asdict(entry) for entry in result.classes],
        "folds": result.folds,
        "pooled": pooled,
        "mean": {name: mean for name, (mean, _) in spreads.items()},
        "standard_deviation": {name: deviation for name, (_, deviation) in spreads.items()},
    }
    write_json(run / "folds.json", null_for_nan(content))
    return result


def assign(folder: TileFolder, num_folds: int, seed: int) -> dict[str, int]:
    """The fold of each image that is not for testing, by its name.

    Takes the folds of folds.csv if their number is `num_folds`; otherwise draws groups.

    Raises:
        DatasetError: there are fewer groups than folds.
    """
    rows = read_folds(folds_file(folder.root))
    own = {row.tile_id: row.fold for row in rows if row.fold != TEST_FOLD}
    if len(set(own.values())) == num_folds:
        order = sorted(set(own.values()))
        return {name: order.index(fold) for name, fold in own.items()}
    tiles = [*folder.tiles["validation"], *folder.tiles["training"]]
    groups = Counter(tile.group or tile.tile_id for tile in tiles)
    if len(groups) < num_folds:
        raise DatasetError(
            f"--folds is {num_folds}, and {folder.root} has {len(groups)} patients, slides or "
            "images that are not for testing; expected at least one per fold. Use fewer folds."
        )
    drawn = assign_folds(groups, num_folds, seed)
    if not any(tile.group for tile in tiles):
        warn(
            "folds.csv has no column group: folds are drawn by image, and images of one patient "
            "may be in several"
        )
    return {tile.tile_id: drawn[tile.group or tile.tile_id] for tile in tiles}


def _part(folder: TileFolder, folds: dict[str, int], fold: int) -> TileFolder:
    tiles: list[Tile] = [*folder.tiles["validation"], *folder.tiles["training"]]
    held_out = tuple(tile for tile in tiles if folds[tile.tile_id] == fold)
    others = tuple(tile for tile in tiles if folds[tile.tile_id] != fold)
    return replace(folder, tiles={"training": others, "validation": held_out, "test": ()})


def _require_trainable(folder: TileFolder, parts: Sequence[TileFolder]) -> None:
    """Refuse what a later fold would be refused for, before the first is trained.

    Raises:
        FocalPathError: an image or mask cannot be read, or a fold lacks a class or labels.
    """
    open_tiles = replace(folder, tiles={**folder.tiles, "test": ()})
    counts = {
        tile.tile_id: pixels
        for split, each in count_all(open_tiles).items()
        for tile, pixels in zip(folder.tiles[split], each, strict=True)
    }
    for number, part in enumerate(parts):
        own: dict[Split, NDArray[np.int64]] = {
            split: np.stack([counts[tile.tile_id] for tile in tiles])
            for split, tiles in part.tiles.items()
            if tiles
        }
        try:
            require_trainable(part, own)
        except DatasetError as error:
            raise DatasetError(
                f"with fold {number} of {len(parts)} held out: {error} Or use fewer --folds."
            ) from error


def _warn_of_start(earlier: Path) -> None:
    """Tell that the run which all folds start from may know the images that they are scored on."""
    data = read_card(earlier).data
    warn(
        f"every fold starts from {earlier}, which was trained on "
        f"{'unknown images' if data is None else f'images of {data.name}'}: where a fold's own "
        "are among them, scores will be better than on new patients"
    )


def _forget(run: Path) -> None:
    """Remove what would count as done or begun, so that no earlier fold is mixed with new ones."""
    for name in ("folds.json", f"fold*/{_DONE_FILE}", f"fold*/{LAST_FILE}"):
        for path in run.glob(name):
            path.unlink(missing_ok=True)


def _fold(
    settings: Settings, part: TileFolder, run: Path, inputs: Inputs, *, overwrite: bool
) -> NDArray[np.int64]:
    """Train a fold; returns the (C, C) confusion of its images."""
    Console().rule(escape(run.name))
    resume = (run / LAST_FILE).is_file() and not overwrite
    fit(settings, part, run, resume=resume, overwrite=not resume)
    confusion = count_split(*load_checkpoint(run), part, "validation", tta=False)
    counts = confusion.long().numpy()
    write_json(run / _DONE_FILE, {"inputs": inputs, "confusion": counts.tolist()})
    return np.asarray(counts, np.int64)


def _read_done(run: Path, inputs: Inputs) -> NDArray[np.int64] | None:
    """The (C, C) confusion of a finished fold's images; None where it is not finished.

    Raises:
        RunError: it was trained with other inputs.
    """
    try:
        content: dict[str, Any] = json.loads((run / _DONE_FILE).read_text(encoding="utf-8"))
        before, confusion = content["inputs"], np.array(content["confusion"], np.int64)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if changes := changed_inputs(before, inputs):
        raise RunError(
            f"{run} was trained with other settings or data ({', '.join(changes.values())}); "
            "expected the same. Give another folder, or --overwrite to train all folds again."
        )
    return confusion


@rank_zero_only
def _write_assignment(path: Path, folds: dict[str, int]) -> None:
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["img_id", "fold"])
        rows.writerows(sorted(folds.items()))


def print_folds(result: CrossValidation) -> None:
    """Print Dice of each class: pooled, and mean and spread over the folds."""
    table = Table("Class", title=f"Cross-validation, {len(result.folds)} folds")
    for column in ("Dice, pooled", "Dice, folds", "IoU, pooled", "IoU, folds"):
        table.add_column(column, justify="right")
    for name in [*(entry.name for entry in result.classes), "mean"]:
        cells = []
        for score in ("dice", "iou"):
            mean, deviation = result.spread(f"{score}/{name}")
            cells += [f"{result.pooled[f'{score}/{name}']:.4f}", f"{mean:.4f} ± {deviation:.4f}"]
        table.add_row("Mean" if name == "mean" else escape(name), *cells)
    Console().print(table)
