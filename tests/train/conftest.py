import shutil
from pathlib import Path

import pytest


@pytest.fixture
def data_copy(toy_data: Path, tmp_path: Path) -> Path:
    """A copy of the toy data set that a test may change."""
    return Path(shutil.copytree(toy_data, tmp_path / "data"))


@pytest.fixture
def run_copy(toy_run: Path, tmp_path: Path) -> Path:
    """A copy of the toy run that a test may change."""
    return Path(shutil.copytree(toy_run, tmp_path / "run"))
