from pathlib import Path

import pytest

from export.__main__ import main
from serve.manifest import read_bundle


def _fail(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_a_missing_checkpoint_is_one_error_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _fail(tmp_path / "no_run", "--out", tmp_path / "bundle") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: no checkpoint:")
    assert list(tmp_path.iterdir()) == []


def test_keeping_no_version_is_refused_before_the_export(
    toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--out", tmp_path / "bundle", "--model-repository", tmp_path, "--keep", "0")
    assert _fail(toy_run, *arguments) == 1
    assert "--keep is 0; expected at least 1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_error(
    toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert _fail(toy_run, "--out", tmp_path / "file" / "bundle") == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_the_settings_are_flat_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert _fail("--help") == 0
    shown = capsys.readouterr().out
    for option in ("--fp32-islands", "--bf16", "--int8", "--half-agreement", "--keep", "--target"):
        assert option in shown


def test_export_publishes_for_the_target_and_keeps_so_many_versions(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle is there already: only what follows the export is looked at."""
    monkeypatch.setattr(
        "export.__main__.write_bundle", lambda checkpoint, out, settings: read_bundle(out)
    )
    for version in ("1", "2", "3"):
        (tmp_path / "segmenter" / version).mkdir(parents=True)
    where = ["--out", str(toy_bundle), "--model-repository", str(tmp_path)]
    main(["checkpoint", *where, "--target", "onnxruntime", "--keep", "2"])
    names = sorted(path.name for path in (tmp_path / "segmenter").iterdir())
    assert names == ["3", "4", "config.pbtxt"]
