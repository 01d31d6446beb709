import json
import sys
from pathlib import Path

import pytest

from tests.support.published_data import SIDE, write_crag
from train.cli import main


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
    main()


def test_the_command_prepares_with_its_options_and_prints_the_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_crag(tmp_path / "in")
    out = tmp_path / "out"
    run(monkeypatch, "prepare", "crag", tmp_path / "in", out, "--tile-size-px", SIDE)
    assert "50.00%" in capsys.readouterr().out
    assert json.loads((out / "settings.json").read_text())["tiles"]["tile_size_px"] == SIDE


def test_the_command_ends_a_mistake_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "prepare", "bdsa", tmp_path, tmp_path / "out")
    told = str(ended.value)
    assert told.startswith(f"error: {tmp_path} ")
    assert "images" in told
    assert "\n" not in told
