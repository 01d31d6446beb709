import json
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

from tests.support import ROOT
from tests.support.distributed import settings_of
from tests.support.errors import raises
from tests.support.ports import free_port
from tests.support.toy_data import rows_of
from train.data.folder import read_tile_folder
from train.data.pixels import count_each
from train.errors import SettingsError
from train.fitting.loaders import make_loaders
from train.fitting.run import fit
from train.fitting.scores import evaluate, print_scores
from train.fitting.trainer import trainer_of
from train.model.checkpoint import load_checkpoint, read_card
from train.model.segmenter import Segmenter

pytestmark = pytest.mark.slow


def start(folder: Path, data: Path, **environment: str) -> subprocess.Popen[bytes]:
    root = str(ROOT)
    with (folder / f"messages{environment['NODE_RANK']}.txt").open("w") as messages:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.support.distributed", str(data), str(folder / "run")],
            cwd=root,
            env={
                "PYTHONPATH": root,
                "PATH": "/usr/bin:/bin",
                "OMP_NUM_THREADS": "1",  # threads of autograd wait for each other otherwise
                **environment,
            },
            stderr=messages,
        )


@pytest.fixture(scope="module")
def alone(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process with the batches that two share."""
    run = tmp_path_factory.mktemp("alone") / "run"
    fit(settings_of(batch_size=4), toy_data, run)
    return run


@pytest.fixture(scope="module")
def run(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two nodes of one process on the CPU, which talk over gloo.

    The test of distributed pretraining has two devices of one node, by the same Trainer.
    """
    folder = tmp_path_factory.mktemp("ddp")
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [start(folder, toy_data, NODE_RANK=str(n), **address) for n in (0, 1)]
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    messages = "".join(file.read_text() for file in folder.glob("*.txt"))
    assert not any(codes), messages[-3000:]
    assert "sync_dist" not in messages
    return folder / "run"


def test_two_processes_score_as_one(run: Path, toy_data: Path):
    segmenter, card = load_checkpoint(run)
    scores = evaluate(segmenter, card, toy_data, "validation")
    assert scores == pytest.approx(card.metrics, abs=1e-5)


def test_two_processes_learn_what_one_does(run: Path, alone: Path):
    for found, expected in zip(rows_of(run), rows_of(alone), strict=True):
        assert found == pytest.approx(expected, abs=1e-3)
    weights, expected_weights = (
        torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (run, alone)
    )
    distances = [(weights[name] - expected_weights[name]).abs().mean() for name in weights]
    assert max(distances) < 1e-4


def test_two_processes_share_the_tiles_of_an_epoch(run: Path):
    assert len(rows_of(run)) == 2
    state = torch.load(run / "last.ckpt", weights_only=True)
    assert state["global_step"] == 4  # 8 tiles, 2 processes, 2 tiles a step: two steps an epoch


def test_only_one_process_writes(run: Path):
    runtime = json.loads((run / "model.json").read_text())["settings"]["runtime"]
    assert runtime["devices"] * runtime["nodes"] == 2
    assert (run / "training.png").is_file()


def lightning(node: int, local: int) -> dict[str, int | str]:
    return {"NODE_RANK": node, "LOCAL_RANK": local, "WORLD_SIZE": 4}


def torchrun(node: int, local: int) -> dict[str, int | str]:
    groups = {"GROUP_RANK": node, "GROUP_WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "a"}
    return {"RANK": 2 * node + local, "LOCAL_WORLD_SIZE": 2, **groups, **lightning(node, local)}


def slurm(node: int, local: int) -> dict[str, int | str]:
    ids = {"SLURM_PROCID": 2 * node + local, "SLURM_LOCALID": local, "SLURM_NODEID": node}
    job = {"SLURM_JOB_NAME": "fit", "SLURM_JOB_ID": 1, "SLURM_NNODES": 2, "SLURM_NODELIST": "a"}
    tasks = {"SLURM_NTASKS": 4, "SLURM_NTASKS_PER_NODE": 2, "SLURM_STEP_NUM_TASKS": 4}
    return {**tasks, **ids, **job}


@pytest.mark.parametrize("launcher", [lightning, torchrun, slurm])
def test_two_nodes_of_two_devices_share_all_tiles(
    launcher: Callable[[int, int], dict[str, int | str]],
    toy_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    settings = settings_of(batch_size=2, devices=2, nodes=2)
    folder = read_tile_folder(toy_data)
    segmenter = Segmenter(settings.model, 5)
    counts = count_each(folder, "training")
    training, validation = [], []
    for node, local in product(range(2), range(2)):
        with monkeypatch.context() as patch:
            patch.setattr(rank_zero_only, "rank", 0)  # set by Lightning
            for name, value in launcher(node, local).items():
                patch.setenv(name, str(value))
            trainer = trainer_of(settings, tmp_path, [])
            loaders = make_loaders(folder, settings, segmenter, trainer, 0, counts)
        training += [index for _, index in loaders[0].sampler]
        validation += [index for pack in loaders[1].batch_sampler for index in pack]
    assert sorted(training) == list(range(8))
    assert sorted(validation) == list(range(2))


def test_more_processes_than_tiles_are_refused(toy_data: Path, tmp_path: Path):
    with raises(SettingsError, "2 validation tiles", "3 processes"):
        fit(settings_of(batch_size=2, devices=3), toy_data, tmp_path / "run")


def test_only_the_first_process_prints_scores(
    toy_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    card = read_card(toy_run)
    print_scores(card.metrics, card, "Validation")
    assert "Validation" in capsys.readouterr().out
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    print_scores(card.metrics, card, "Validation")
    assert not capsys.readouterr().out
