"""Which processes a training has: its own, or those of srun or torchrun."""

from pathlib import Path

import pytest
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from tests.support.errors import raises
from train.errors import SettingsError
from train.fitting.trainer import make_trainer

BATCH = {
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
STEP = BATCH | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS_PER_NODE": "4"}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "1",
    "RANK": "0",
    "GROUP_RANK": "0",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "WORLD_SIZE": "2",
}


def environment_of(
    variables: dict[str, str], run: Path, devices: int, monkeypatch: pytest.MonkeyPatch
) -> object:
    """What starts the processes of a training with these variables set."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    trainer = make_trainer(run, [], devices=devices, logger=False)
    return trainer._accelerator_connector.cluster_environment


@pytest.mark.parametrize(
    ("variables", "devices", "expected"),
    [
        ({}, 2, LightningEnvironment),
        (BATCH, 1, LightningEnvironment),
        (BATCH, 2, LightningEnvironment),
        (BATCH | {"SLURM_NTASKS": "1"}, 2, LightningEnvironment),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, 2, LightningEnvironment),
        (STEP, 4, SLURMEnvironment),
        (STEP | TORCHRUN, 2, TorchElasticEnvironment),
    ],
)
def test_a_training_starts_the_processes_that_srun_has_not_started(
    variables: dict[str, str],
    devices: int,
    expected: type,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = environment_of(variables, tmp_path, devices, monkeypatch)
    assert type(found) is expected


@pytest.mark.parametrize("devices", [1, 2])
def test_another_number_of_processes_than_srun_has_started_is_refused(
    devices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with raises(SettingsError, 4, devices, "--ntasks-per-node"):
        environment_of(STEP, tmp_path, devices, monkeypatch)


def test_tasks_that_are_not_counted_by_node_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {name: v for name, v in STEP.items() if name != "SLURM_NTASKS_PER_NODE"}
    with raises(SettingsError, "--ntasks-per-node"):
        environment_of(variables, tmp_path, 4, monkeypatch)
