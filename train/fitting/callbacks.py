"""Callbacks of a run: the best checkpoint, the progress bar, the handler of SIGTERM."""

import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback, RichProgressBar

from train.fitting.task import SegmentationTask
from train.model.checkpoint import CheckpointCard, save_checkpoint
from train.settings import LabelClass

_CLASSES_IN_BAR = 6


class BestCheckpoint(Callback):
    """Writes the checkpoint of the best mean validation Dice so far, or of every epoch."""

    def __init__(
        self, run: Path, card: "partial[CheckpointCard]", keep: Literal["best", "last"]
    ) -> None:
        self._run = run
        self._make_card = card
        self._keep = keep
        self._best_dice = -1.0

    def on_validation_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Write the checkpoint if it is the best one, or if every one is kept."""
        assert isinstance(task, SegmentationTask)
        scores = {
            name.removeprefix("validation/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(("validation/dice/", "validation/iou/"))
        }
        is_best = scores["dice/mean"] > self._best_dice  # never true for NaN
        if not is_best and self._keep == "best":
            return
        if is_best:
            self._best_dice = scores["dice/mean"]
        if trainer.is_global_zero:
            bias = task.segmenter.class_attention_bias.per_class().tolist()
            card = self._make_card(class_attention_bias=tuple(bias), metrics=scores)
            save_checkpoint(self._run, task.segmenter, card)

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs."""
        return {"best_dice": self._best_dice}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the best Dice of the resumed run."""
        self._best_dice = state_dict["best_dice"]


class OwnSigterm(Callback):
    """Keeps this process's own SIGTERM handler.

    Lightning's handler starts a broadcast. It waits forever for processes that are busy with
    another collective operation.
    """

    def setup(self, trainer: L.Trainer, task: L.LightningModule, stage: str) -> None:
        """Remember the present handler."""
        self._handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Restore the handler after Lightning has set its own."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)


class EpochProgressBar(RichProgressBar):
    """Lightning's progress bar, which leaves nothing behind and counts epochs from 1."""

    def __init__(self) -> None:
        super().__init__(leave=False)

    def _get_train_description(self, current_epoch: int) -> str:
        text = f"Epoch {current_epoch + 1}/{self.trainer.max_epochs}"
        return text.ljust(len(self.validation_description))  # else the bars jump


class ClassProgressBar(EpochProgressBar):
    """The progress bar with the last validation Dice per class, named by three letters."""

    def __init__(self, classes: tuple[LabelClass, ...]) -> None:
        super().__init__()
        self._classes = classes
        self._shown: dict[str, Any] = {}

    def on_train_epoch_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Read the numbers once per epoch: to read them from a GPU after a step waits for it."""
        found = trainer.callback_metrics
        self._shown = {}
        if "loss" in found:
            self._shown["loss"] = f"{found['loss']:.3f}"
        if "validation/dice/mean" in found:
            each = [
                f"{entry.name[:3]} {found[f'validation/dice/{entry.name}']:.2f}"
                for entry in self._classes[:_CLASSES_IN_BAR]
            ]
            self._shown["Dice"] = f"{found['validation/dice/mean']:.3f} ({' '.join(each)})"
        super().on_train_epoch_start(trainer, task)

    def get_metrics(self, trainer: L.Trainer, task: L.LightningModule) -> dict[str, Any]:
        """The loss, the mean Dice and the Dice of each class, of the epoch before."""
        return dict(self._shown)
