import json
from pathlib import Path

import pytest

from tests.support.commands import run_train
from tests.support.published_data import SIDE, write_crag


def test_the_command_prepares_with_its_options_and_prints_the_shares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_crag(tmp_path / "in")
    out = tmp_path / "out"
    run_train("prepare", "crag", tmp_path / "in", out, "--tile-size-px", SIDE)
    assert "50.00%" in capsys.readouterr().out
    assert json.loads((out / "settings.json").read_text())["tiles"]["tile_size_px"] == SIDE


def test_the_command_ends_a_mistake_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        run_train("prepare", "bdsa", tmp_path, tmp_path / "out")
    told = str(ended.value)
    assert told.startswith(f"error: {tmp_path} ")
    assert "images" in told
    assert "\n" not in told
