"""Records the inputs of a run in last.ckpt, so that only the same run is resumed."""

import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.plugins.io import TorchCheckpointIO

from train.data.folder import Split, TileFolder
from train.errors import RunError
from train.files import whole_file
from train.model.weight_files import DAMAGED, check_sums
from train.settings import Settings

_MAY_CHANGE = ("preset", "num_workers", "track", "compile", "exportable")
_LABELS = "labels"
_SPLITS: tuple[Split, ...] = ("training", "validation")

Inputs = dict[str, Any]
"""Everything that a run's result depends on, by setting name, after a round trip through JSON."""


class RunInputs(Callback):
    """Writes a run's inputs into its last.ckpt."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must share."""
        return {"inputs": self._inputs}


class WholeStateIO(TorchCheckpointIO):
    """Writes last.ckpt atomically. Lightning alone would leave half a file on a full disk."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Serialise the checkpoint, then write it atomically."""
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with whole_file(Path(path)) as partial:
            partial.write_bytes(content.getbuffer())


class ResumableEarlyStopping(EarlyStopping):
    """Early stopping that a resumed run respects."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Stop at once if the resumed run had stopped early."""
        if self.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
            trainer.should_stop = True


def run_inputs(settings: Settings, folder: TileFolder, difficulty: torch.Tensor | None) -> Inputs:
    """Collect everything that a run's result depends on.

    Args:
        settings: The whole configuration.
        folder: The data set, identified by its classes, its masks and what their values mean, and
            the names and sizes of its images. Reading these would take as long as an epoch.
        difficulty: The baseline's Dice per class (C,), if the strategy needs it.
    """
    values = _by_setting(asdict(settings))
    # The cache's path does not matter, but its use does: it rounds the features.
    values["embedding_cache"] = values["embedding_cache"] is not None
    values["difficulty_from"] = _numbers(difficulty)
    values["data"] = _fingerprint(folder)
    values[_LABELS] = _labels(folder)
    kept = {name: value for name, value in values.items() if name not in _MAY_CHANGE}
    read_back: Inputs = json.loads(json.dumps(kept))
    return read_back


def resumed_epoch(last: Path, inputs: Inputs) -> int:
    """The epoch, counted from 0, at which a run continues from `last`.

    The new run may have more epochs. Its learning rate then follows the longer schedule.

    Raises:
        RunError: the file is missing or damaged, or belongs to a run with other inputs.
    """
    if not last.is_file():
        raise RunError(
            f"nothing to resume: {last} does not exist. A run writes it after each epoch. Leave "
            "out --resume to train from the start; add --overwrite to replace a trained model."
        )
    try:
        check_sums(last)
        state = torch.load(last, map_location="cpu", mmap=True, weights_only=True)
        before: Inputs = state["callbacks"][RunInputs.__qualname__]["inputs"]
        epoch: int = state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    except (OSError, *DAMAGED) as error:
        first_line = str(error).partition("\n")[0]
        raise RunError(
            f"{last} is damaged or from another version ({type(error).__name__}: {first_line}), "
            "and cannot be resumed. Start over with --overwrite."
        ) from error
    old, new = _by_setting(before), _by_setting(inputs)
    changes = [
        change
        for name, change in changed_inputs(before, inputs).items()
        if not (name == "epochs" and new[name] > old.get(name, math.inf))
    ]
    if changes:
        raise RunError(
            f"{last} belongs to a run with other inputs: {', '.join(changes)}. "
            "Resume with the earlier ones, or start over with --overwrite."
        )
    return epoch


def changed_inputs(before: Inputs, now: Inputs) -> dict[str, str]:
    """What differs between the inputs of two runs, by name; masks of an earlier version do not."""
    old, new = _by_setting(before), _by_setting(now)
    return {
        name: f"{name} {old.get(name)} -> {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not (name == _LABELS and name not in old)
    }


def _by_setting(inputs: Mapping[str, Any]) -> Inputs:
    """Merge the groups of settings, whose field names are unique over all groups."""
    values: Inputs = {}
    for name, group in inputs.items():
        values |= group if isinstance(group, dict) else {name: group}
    return values


def _numbers(values: torch.Tensor | None) -> list[float | None] | None:
    """Convert to a list with None for NaN, which is not equal to itself."""
    if values is None:
        return None
    return [None if math.isnan(value) else value for value in values.tolist()]


def _labels(folder: TileFolder) -> str:
    """A hash of all masks and of what their values and colours mean."""
    digest = hashlib.sha256()
    for tile in (tile for split in _SPLITS for tile in folder.tiles[split]):
        digest.update(repr(tile.code).encode())
        with tile.mask.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _fingerprint(folder: TileFolder) -> str:
    tiles = [
        (split, tile.tile_id, tile.mpp, tile.image.stat().st_size, tile.mask.stat().st_size)
        for split in _SPLITS
        for tile in folder.tiles[split]
    ]
    content = json.dumps([folder.mpp, [entry.name for entry in folder.classes], tiles])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
