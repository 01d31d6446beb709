import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from export.__main__ import main
from export.engine_plan import plan_for
from serve.manifest import read_bundle


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    """A bundle with a plan for an engine."""
    folder = Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))
    manifest = read_bundle(folder)
    plan_for(manifest, manifest.artefacts[0]).write(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)


def _fail(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_engine_on_the_wrong_machine_ends_with_status_2_and_the_container_command(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(bundle.iterdir())
    assert _fail("engine", bundle) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert lines[0].startswith("error: TensorRT cannot be imported on this machine")
    assert lines[-1].startswith("docker run --rm --gpus all")
    assert sorted(bundle.iterdir()) == before


def test_engine_without_a_bundle_is_one_error_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _fail("engine", tmp_path / "nothing") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: no bundle at")


def test_engine_compares_on_the_data_that_it_is_given(
    bundle: Path, toy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []

    def build(folder: Path, images: object, container: object) -> Path:
        shapes.append(images.shape)  # type: ignore[attr-defined]
        return folder / "model.plan"

    monkeypatch.setattr("export.__main__.build_engine", build)
    main(["engine", str(bundle), "--validate", str(toy_data), "--num-tiles", "3"])
    assert shapes == [(3, 64, 64, 3)]


def _pretend_docker(monkeypatch: pytest.MonkeyPatch, status: int) -> list[list[str]]:
    commands: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        commands.append(list(command))
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_with_docker_the_container_command_is_run(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = _pretend_docker(monkeypatch, status=0)
    main(["engine", str(bundle), "--docker"])
    (command,) = commands
    assert command[:3] == ["docker", "run", "--rm"]
    assert f"{bundle}:/bundle" in command


def test_the_container_sees_the_data_set_and_compares_on_as_many_tiles(
    bundle: Path, toy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = _pretend_docker(monkeypatch, status=0)
    main(["engine", str(bundle), "--docker", "--validate", str(toy_data), "--num-tiles", "3"])
    (command,) = commands
    mount = f"/data/{toy_data.name}"
    assert f"{toy_data}:{mount}:ro" in command
    assert command[-1].endswith(f"engine /bundle --validate {mount} --num-tiles 3")


def test_a_container_that_fails_is_an_error(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_docker(monkeypatch, status=1)
    assert _fail("engine", bundle, "--docker") == 1


def test_a_docker_that_cannot_start_the_container_leaves_the_command_to_the_user(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _pretend_docker(monkeypatch, status=125)
    assert _fail("engine", bundle, "--docker") == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("docker run")


def test_without_docker_the_flag_changes_nothing(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert _fail("engine", bundle, "--docker") == 2


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
