"""The run's metrics.csv: one row per epoch, counted from 1."""

import csv
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

from train.errors import RunError
from train.files import whole_file

METRICS_FILE = "metrics.csv"
Row = dict[str, str]


class MetricsFile(Callback):
    """Writes one CSV row per epoch, atomically. A resumed run keeps the earlier rows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[Row] = []

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Read the rows of earlier epochs."""
        if self._path.is_file():
            done = trainer.current_epoch  # Lightning counts from 0
            self._rows = [row for row in read_metrics(self._path) if int(row["epoch"]) <= done]

    def on_train_epoch_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Add the epoch's row."""
        values = {name: str(float(value)) for name, value in trainer.callback_metrics.items()}
        epoch = str(trainer.current_epoch + 1)
        self._rows.append({"epoch": epoch, **dict(sorted(values.items()))})
        if not trainer.is_global_zero:
            return
        with (
            whole_file(self._path) as partial_path,
            partial_path.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, list(self._rows[-1]), restval="")
            writer.writeheader()
            writer.writerows(self._rows)


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics.csv, with the epochs counted from 1.

    Earlier versions of FocalPath counted from 0; the rows of their files are renumbered.

    Raises:
        RunError: it is not as a run writes it, such as one that a spreadsheet saved.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
        epochs = [int(row["epoch"]) for row in rows]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise RunError(
            f"{path} is not as the run wrote it ({type(error).__name__}: {error}); expected a "
            "column epoch, and commas. Restore the file, or remove it to go on without its rows."
        ) from error
    first = 1 if epochs and epochs[0] == 0 else 0
    for row, epoch in zip(rows, epochs, strict=True):
        row["epoch"] = str(epoch + first)
    return rows
