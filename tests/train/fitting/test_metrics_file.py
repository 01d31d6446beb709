from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.errors import raises
from train.errors import RunError
from train.fitting.metrics_file import MetricsFile, read_metrics


def test_a_resumed_run_keeps_the_rows_of_a_file_that_counted_epochs_from_0(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,loss\n0,0.5\n1,0.25\n2,0.125\n")
    callback = MetricsFile(path)
    # Two epochs are done: last.ckpt is older than the file's last row.
    trainer: Any = SimpleNamespace(current_epoch=2, is_global_zero=True)
    trainer.callback_metrics = {"loss": torch.tensor(0.75)}
    callback.on_train_start(trainer, SimpleNamespace())  # type: ignore[arg-type]
    callback.on_train_epoch_end(trainer, SimpleNamespace())  # type: ignore[arg-type]
    rows = [(row["epoch"], float(row["loss"])) for row in read_metrics(path)]
    assert rows == [("1", 0.5), ("2", 0.25), ("3", 0.75)]


@pytest.mark.parametrize(
    "content", [b"epoch;loss\n1;0.5\n", b"epoch,loss\n1.0,0.5\n", b"loss\n0.5\n", b"epoch\n\xff\n"]
)
def test_a_file_that_something_else_has_saved_is_one_error(content: bytes, tmp_path: Path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    with raises(RunError, str(path), "Restore the file, or remove it"):
        read_metrics(path)
