import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import ROOT
from tests.support.distributed_pretraining import settings_of
from tests.support.ports import free_port
from train.pretraining.run import pretrain

pytestmark = pytest.mark.slow


def test_two_processes_pretrain_what_one_does(drawn_slides: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.distributed_pretraining"]
    shared = tmp_path / "shared"
    alone = tmp_path / "alone"
    with subprocess.Popen(
        [*command, str(drawn_slides), str(shared), "2"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        | {"MASTER_PORT": str(free_port())},
        stderr=subprocess.PIPE,
        text=True,
    ) as together:
        pretrain(settings_of(batch_size=4), drawn_slides, alone)  # meanwhile
        _, errors = together.communicate(timeout=300)
    assert together.returncode == 0, errors[-3000:]
    found, expected = (load_file(run / "encoder" / "model.safetensors") for run in (shared, alone))
    assert found.keys() == expected.keys()
    assert max((found[name] - expected[name]).abs().max() for name in expected) < 1e-5
    losses = []
    for run in (shared, alone):
        with (run / "metrics.csv").open(newline="") as file:
            losses.append([float(row["context"]) for row in csv.DictReader(file)])
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    state = torch.load(shared / "last.ckpt", weights_only=True)
    assert state["global_step"] == 4
