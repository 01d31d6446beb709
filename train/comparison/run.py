"""One row of a comparison with one seed: trained and scored once.

.seedN.lock        held by the process that works on seedN/, until it ends
seedN/             a training run (see `train.fitting.run`), and beside its files
    row.json       its inputs, its stage, and how long training took
    test.npz       tile_ids (N,); confusion (N, C, C) int64, target x prediction, of each test tile
    leverage.json  what the class bias does (see `train.fitting.leverage`)
    panels/ID.png  predicted labels of the tiles that Fig. 4 shows
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageColor
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import track
from torch import Tensor

from serve.contract.file_lock import file_lock
from serve.contract.machine import this_processor
from serve.contract.npz import read_npz
from serve.contract.refusal import first_problem
from train.comparison.inputs import Inputs, changes, inputs_of
from train.comparison.methods import BASELINE, Row
from train.data.folder import Tile, TileFolder
from train.errors import RunError, StorageError
from train.files import whole_file, write_json
from train.fitting.evaluation import predict_split
from train.fitting.leverage import Leverage, measure_leverage
from train.fitting.run import LAST_FILE, fit
from train.metrics import image_confusion
from train.model.checkpoint import WEIGHTS_FILE, CheckpointCard, load_checkpoint, read_card
from train.model.weight_files import weights_sha256
from train.settings import LabelClass, Settings

_MARKER_FILE, _SCORES_FILE, _PANELS = "row.json", "test.npz", "panels"
_LEVERAGE_FILE = "leverage.json"


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """A trained and scored run."""

    card: CheckpointCard
    confusion: NDArray[np.int64]
    """(N, C, C) pixels of each test tile, target x prediction."""
    train_seconds: float
    """Wall-clock, validation included."""
    cpu_seconds: float | None
    """CPU time of the process for the same; None if the run was interrupted."""
    device: str
    panels: Path
    """The folder of predicted labels."""
    leverage: tuple[Leverage, ...] = ()
    """What the class bias does on the test images; empty in runs of earlier versions."""


@dataclass(frozen=True)
class RowRun:
    """One row with one seed: trained, scored, and marked as finished."""

    row: Row
    seed: int
    settings: Settings
    root: Path
    fingerprint: str

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.root / self.row.name / f"seed{self.seed}"

    @property
    def baseline(self) -> "RowRun | None":
        """The run whose Dice the row's bias starts from; None for rows that need none."""
        if not self.row.strategy.needs_baseline:
            return None
        return replace(self, row=BASELINE, settings=BASELINE.settings(self.settings, self.seed))

    @contextmanager
    def lock(self, *, wait: bool) -> Iterator[bool]:
        """Keep other processes from this run; yields whether it was free, or has become so."""
        path = self.folder.with_name(f".{self.folder.name}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(path, wait=wait) as free:
            yield free

    @property
    def marker(self) -> dict[str, Any]:
        """The content of `row.json`; empty if there is none."""
        try:
            content = json.loads((self.folder / _MARKER_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    @property
    def inputs(self) -> Inputs:
        """Everything that the result depends on, as `row.json` stores it."""
        baseline = None if self.baseline is None else self.baseline.folder
        return inputs_of(self.settings, self.fingerprint, baseline)

    @property
    def changes(self) -> list[str]:
        """Differences to the inputs that it was trained from; none if it was not trained."""
        marker = self.marker
        if not marker:
            return []
        return changes(marker.get("inputs") or {}, self.inputs, self.settings.preset)

    @property
    def finished(self) -> bool:
        """Whether it was trained from these inputs, and scored."""
        scored = self.marker.get("stage") == "finished" and (self.folder / _SCORES_FILE).is_file()
        return scored and not self.changes

    @property
    def ready(self) -> bool:
        """Whether everything that it starts from is finished."""
        return self.baseline is None or self.baseline.finished

    def complete(self, data: TileFolder, panels: tuple[Tile, ...]) -> None:
        """Train and score whatever is missing. The caller holds the lock."""
        if changed := self.changes:
            aside = f"{self.folder.name}.before-{time.strftime('%Y%m%d-%H%M%S')}"
            self.folder.rename(self.folder.with_name(aside))
            Console().print(
                f"  trained earlier with other inputs ({', '.join(changed)}): kept as {aside}; "
                "training again",
                markup=False,
            )
        marker = self.marker
        trained = marker.get("stage") in ("trained", "finished")
        if not (trained and (self.folder / WEIGHTS_FILE).is_file()):
            self._train(data, marker)
        if self.marker["stage"] != "finished" or not (self.folder / _SCORES_FILE).is_file():
            self._score(data, panels)

    def result(self) -> RowResult:
        """Read the files that `complete` wrote."""
        return RowResult(
            card=read_card(self.folder),
            confusion=read_npz(self.folder / _SCORES_FILE)["confusion"],
            train_seconds=self.marker["train_seconds"],
            cpu_seconds=self.marker["cpu_seconds"],
            device=self.marker["device"],
            panels=self.folder / _PANELS,
            leverage=_read_leverage(self.folder / _LEVERAGE_FILE),
        )

    def _train(self, data: TileFolder, marker: dict[str, Any]) -> None:
        """Train, continuing from the `last.ckpt` of an interrupted run.

        The time then counts what led to `last.ckpt`, and what follows.
        """
        last = self.folder / LAST_FILE
        resume = marker.get("stage") == "training" and last.is_file()
        before = 0.0
        if resume:
            worked = last.stat().st_mtime - marker["started_at"]
            before = marker["train_seconds"] + max(0.0, worked)
            Console().print(f"  interrupted after {duration_text(before)}: resumed")
        started, cpu_started = time.monotonic(), time.process_time()
        marker = {
            "stage": "training",
            "started_at": time.time(),
            "train_seconds": before,
            "cpu_seconds": None,
            "device": _device_name(),
            "inputs": self.inputs,
        }
        self._mark(marker)
        fit(
            self.settings,
            data.root,
            self.folder,
            resume=resume,
            overwrite=not resume,
            difficulty_from=self.baseline.folder if self.baseline else None,
        )
        weights_sha256.cache_clear()
        if changed := self.changes:
            raise RunError(
                f"what {self.folder} starts from was replaced while it was trained "
                f"({', '.join(changed)}). Repeat the command: rows that started from something "
                "else are trained again."
            )
        seconds = before + time.monotonic() - started
        cpu_seconds = None if resume else time.process_time() - cpu_started
        times = {"train_seconds": seconds, "cpu_seconds": cpu_seconds}
        self._mark({**marker, **times, "stage": "trained"})

    def _score(self, data: TileFolder, panels: tuple[Tile, ...]) -> None:
        segmenter, card = load_checkpoint(self.folder)
        shown = {tile.tile_id for tile in panels}
        tile_ids, confusions = [], []
        predictions = predict_split(segmenter, card, data, "test", tta=False)
        for tile_id, predicted, labels in track(
            predictions, "Scoring test tiles", total=len(data.tiles["test"]), transient=True
        ):
            tile_ids.append(tile_id)
            confusions.append(image_confusion(predicted, labels, len(card.classes)).numpy())
            if tile_id in shown:
                _save_labels(predicted, card.classes, self.folder / _PANELS / f"{tile_id}.png")
        # A file, as numpy adds .npz to another name.
        with whole_file(self.folder / _SCORES_FILE) as partial, partial.open("wb") as file:
            np.savez_compressed(file, tile_ids=np.array(tile_ids), confusion=np.stack(confusions))
        leverage = [asdict(entry) for entry in measure_leverage(segmenter, card, data, "test")]
        write_json(self.folder / _LEVERAGE_FILE, leverage)
        self._mark({**self.marker, "stage": "finished"})
        (self.folder / LAST_FILE).unlink(missing_ok=True)  # large, and of no more use

    def _mark(self, marker: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / _MARKER_FILE, marker)


def _read_leverage(path: Path) -> tuple[Leverage, ...]:
    if not path.is_file():
        return ()
    try:
        return TypeAdapter(tuple[Leverage, ...]).validate_json(path.read_bytes())
    except ValidationError as error:
        raise StorageError(
            f"{path} is damaged: {first_problem(error, 'the file')}. Remove its folder, and run "
            "the comparison again."
        ) from error


def duration_text(seconds: float) -> str:
    """`40 s`, `12 min` or `2.5 h`."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _device_name() -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"{this_processor().name} (threads: {torch.get_num_threads()})"


def _save_labels(predicted: Tensor, classes: tuple[LabelClass, ...], path: Path) -> None:
    """Write labels (H, W) as a PNG of those very values, shown in the classes' colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(predicted.numpy().astype(np.uint8), mode="P")
    colors = ["#ffffff", *(entry.color for entry in classes)]
    image.putpalette([value for color in colors for value in ImageColor.getrgb(color)[:3]])
    image.save(path)
