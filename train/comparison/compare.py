"""The paper's comparison (arXiv 2604.13479): train and score every row with every seed.

OUT/runs/ROW/seedN/    a run of a row (see `train.comparison.run`)
OUT/report/            tables, figures and text (see `train.comparison.report`)
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from train.comparison.methods import Row, RowName, choose_rows, paper_rows
from train.comparison.run import RowResult, RowRun, duration_text
from train.data.folder import Tile, TileFolder, read_tile_folder
from train.data.masks import mask_code
from train.data.pixels import count_each, read_labels
from train.errors import SettingsError
from train.presets import PRESETS
from train.settings import Settings

NUM_PANELS = 4
"""Test tiles that Fig. 4 shows."""
PANEL_SHARE_MIN = 0.01
"""A class counts as present in a tile from this share of its pixels on."""
_SET_BY_ROWS = (
    ("model", "bias"),
    ("bias", "bias_init"),
    ("bias", "bias_frozen"),
    ("loss", "focal"),
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that the report needs."""

    settings: Settings
    data: TileFolder
    fingerprint: str
    """SHA-256 of the data set."""
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    results: dict[tuple[RowName, int], RowResult]
    panels: tuple[Tile, ...]
    smallest_difference: float = 0.005
    """The smallest difference in Dice worth telling (our choice)."""
    with_pictures: bool = True
    """Whether the report may show images of the data."""

    def of(self, name: RowName) -> list[RowResult]:
        """A row's results, one per seed."""
        return [self.results[name, seed] for seed in self.seeds]

    def row(self, name: RowName) -> Row | None:
        """The row of that name, or None if it takes no part."""
        return next((row for row in self.rows if row.name == name), None)


def compare(
    settings: Settings,
    data: Path,
    out: Path,
    *,
    num_seeds: int = 5,
    rows: tuple[RowName, ...] | None = None,
    smallest_difference: float = 0.005,
    with_pictures: bool = True,
) -> Comparison:
    """Train and score every row with every seed; finished runs are not repeated.

    Several processes may share `out`, as on several GPUs: a run is trained by one of them.

    Seeds are the outer loop, so that a slow hour of the machine affects all rows equally.

    Args:
        settings: What all rows share; the bias and the focal loss are the rows' own.
        data: A data set in SAM-Path's layout, with test tiles.
        out: The folder of the runs.
        num_seeds: Trainings of each row, with the seeds from `settings` on.
        smallest_difference: The smallest difference in Dice worth telling.
        rows: The rows to train, by default the paper's; the baseline always takes part.
        with_pictures: Whether the report may show images of the data, which its terms may forbid.

    Raises:
        SettingsError: the settings do not fit a comparison.
        FocalPathError: the data cannot be used.
    """
    chosen = choose_rows(paper_rows() if rows is None else rows)
    _check(settings, num_seeds, chosen)
    folder = read_tile_folder(data)
    count_each(folder, "test")
    first = settings.optimization.seed
    comparison = Comparison(
        settings=settings,
        data=folder,
        fingerprint=data_fingerprint(folder),
        rows=chosen,
        seeds=tuple(range(first, first + num_seeds)),
        results={},
        panels=choose_panels(folder) if with_pictures else (),
        smallest_difference=smallest_difference,
        with_pictures=with_pictures,
    )
    runs = [
        RowRun(row, seed, row.settings(settings, seed), out / "runs", comparison.fingerprint)
        for seed in comparison.seeds
        for row in comparison.rows
    ]
    _complete(runs, comparison)
    comparison.results.update({(run.row.name, run.seed): run.result() for run in runs})
    return comparison


def _complete(runs: list[RowRun], comparison: Comparison) -> None:
    """Train and score the runs, and leave to other processes what they are training.

    At the end it waits for those, and takes over what another process did not finish.
    """
    left = []
    for position, run in enumerate(runs):
        with run.lock(wait=False) as free:
            if free and run.ready:
                _announce(runs, position)
                run.complete(comparison.data, comparison.panels)
                continue
        left.append(position)
        Console().print(f"{run.row.title}, seed {run.seed}: another process is training this row")
    for position in left:
        with runs[position].lock(wait=True):
            _announce(runs, position)
            runs[position].complete(comparison.data, comparison.panels)


def _check(settings: Settings, num_seeds: int, rows: tuple[Row, ...]) -> None:
    if num_seeds < 1:
        raise SettingsError(f"--seeds is {num_seeds}; give 1 or more; verdicts need 5")
    if settings.runtime.devices * settings.runtime.nodes > 1:
        raise SettingsError(
            f"{settings.runtime.devices} devices and {settings.runtime.nodes} nodes are set, but "
            "each training of a comparison uses one. To use several, start the same command once "
            "for each (CUDA_VISIBLE_DEVICES=0, =1, ...): they share the runs in --out."
        )
    own_encoders = [row.name for row in rows if row.changed("model", "image_encoder")]
    if own_encoders and not settings.model.image_encoder.startswith("tiny"):
        raise SettingsError(
            f"--rows has {own_encoders[0]}, which trains another small encoder from scratch, and "
            f"image_encoder is {settings.model.image_encoder}; expected a preset with a small one. "
            "Leave the row out."
        )
    preset = PRESETS[settings.preset]()
    for section, name in _SET_BY_ROWS:
        found, expected = (getattr(getattr(s, section), name) for s in (settings, preset))
        if found != expected:
            option = f"--{'no-' if found is False else ''}{name.replace('_', '-')}"
            raise SettingsError(
                f"{name} is {found}, but the rows of the comparison set it themselves; leave out "
                f"{option} and choose methods with --rows"
            )


def _announce(runs: list[RowRun], position: int) -> None:
    """Print which run of how many comes next, and about how long the rest takes."""
    finished = [run.finished for run in runs]
    seconds = [r.marker["train_seconds"] for r, done in zip(runs, finished, strict=True) if done]
    remaining = finished[position:].count(False)
    left = "time left is told after the first run"
    if seconds:
        left = f"about {duration_text(remaining * sum(seconds) / len(seconds))} left"
    run = runs[position]
    Console().print(
        f"[bold]Run {position + 1} of {len(runs)}: {run.row.title}, seed {run.seed}[/bold] "
        f"({'finished' if finished[position] else left})"
    )


def data_fingerprint(folder: TileFolder) -> str:
    """SHA-256 over classes, folds, scales, and every image and mask and what its values mean."""
    digest = hashlib.sha256()
    digest.update(json.dumps([folder.mpp, *map(asdict, folder.classes)]).encode())
    plain = mask_code([c.name for c in folder.classes], [c.color for c in folder.classes])
    tiles = [(split, tile) for split, found in sorted(folder.tiles.items()) for tile in found]
    for split, tile in track(tiles, "Hashing the data set", transient=True):
        digest.update(f"{split} {tile.tile_id}\n".encode())
        if tile.pixel_size != folder.mpp:
            digest.update(f"{tile.pixel_size}\n".encode())
        if tile.code is not None and tile.code != plain:
            digest.update(f"{tile.code}\n".encode())
        for path in (tile.image, tile.mask):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def choose_panels(folder: TileFolder) -> tuple[Tile, ...]:
    """The test tiles with the most classes, by their masks alone: no prediction is looked at."""

    def num_classes(tile: Tile) -> int:
        mask = read_labels(tile, len(folder.classes))
        counts = np.bincount(mask.ravel(), minlength=1 + len(folder.classes))[1:]
        return int((counts >= PANEL_SHARE_MIN * mask.size).sum())

    ranked = sorted(folder.tiles["test"], key=lambda tile: (-num_classes(tile), tile.tile_id))
    return tuple(ranked[:NUM_PANELS])
