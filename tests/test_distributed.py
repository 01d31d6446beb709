import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train.checkpoint import load_checkpoint
from train.fit import evaluate

_SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path

import torch

from tests.toy_data import toy_settings
from train.fit import fit
from train.settings import RuntimeSettings

torch.set_num_threads(1)
settings = replace(toy_settings(), runtime=RuntimeSettings(devices=2))
if __name__ == "__main__":
    fit(settings, Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def run(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes on the CPU, which talk over gloo."""
    folder = tmp_path_factory.mktemp("ddp")
    script = folder / "train_two.py"
    script.write_text(_SCRIPT)
    command = [sys.executable, str(script), str(toy_data), str(folder / "run")]
    root = Path(__file__).parent.parent
    result = subprocess.run(
        command,
        cwd=root,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder / "run"


def test_two_processes_score_as_one(run: Path, toy_data: Path):
    segmenter, card = load_checkpoint(run)
    alone = evaluate(segmenter, card, toy_data, "validation")
    assert alone == pytest.approx(card.metrics, abs=1e-5)


def test_two_processes_share_the_tiles_of_an_epoch(run: Path):
    with (run / "metrics.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2
    state = torch.load(run / "last.ckpt", weights_only=True)
    assert state["global_step"] == 2  # 8 tiles, 2 processes, 4 tiles a step: one step an epoch


def test_only_one_process_writes(run: Path):
    assert json.loads((run / "model.json").read_text())["settings"]["runtime"]["devices"] == 2
    assert (run / "training.png").is_file()
