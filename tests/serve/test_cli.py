import os
import pkgutil
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from serve.cli import main
from serve.inference.trial import HOME_VARIABLE
from serve.settings import InferenceSettings, ServeSettings
from tests.support.interrupts import wait_while_interrupted
from tests.support.pictures import blobs, encoded

IMAGE = blobs(70, 90)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "slide.png"
    path.write_bytes(encoded(IMAGE))
    return path


def _fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message


@pytest.mark.slow
@pytest.mark.parametrize("command", ["http", "benchmark"])
def test_a_missing_bundle_is_one_message(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no bundle at" in _fails(capsys, command, "--bundle", tmp_path / "nowhere")


def test_a_damaged_bundle_is_refused_before_the_service_starts(
    toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(toy_bundle, tmp_path / "bundle")
    with (bundle / "model.onnx").open("ab") as model:
        model.write(b"x")
    assert "is damaged: its SHA-256" in _fails(capsys, "http", "--bundle", bundle)


def test_a_port_in_use_is_one_message(toy_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = _fails(capsys, "http", "--bundle", toy_bundle, "--port", port)
    assert f"port {port}: Address already in use" in message
    assert "--port" in message


@pytest.mark.parametrize(("flag", "value"), [("--host", "localhost"), ("--host", "8.8.8.8")])
def test_an_address_that_cannot_be_listened_at_is_one_message(
    flag: str, value: str, toy_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert value in _fails(capsys, "http", "--bundle", toy_bundle, flag, value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        ("http --threads -1", "--threads is -1; expected 0 to 1024."),
        ("http --port 70000", "--port is 70000; expected 0 to 65535."),
        ("slides run a --rule.saturation 300", "--rule.saturation is 300; expected 0 to 255."),
        ("slides run a --min-area-um2 -1", "--min-area-um2 is -1.0; expected at least 0."),
        ("slides run a --workers 9999", "--workers is 9999; expected 0 to 4096."),
        ("slides run a --overlap 2", "--overlap is 2.0; expected 0 to 0.75."),
    ],
)
def test_an_option_out_of_its_range_is_one_line_with_value_and_range(
    arguments: str, refused: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == 1
    assert capsys.readouterr().err == f"error: {refused}\n"


def test_a_value_that_our_own_check_refuses_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "--allowed-origins" in _fails(capsys, "http", "--allowed-origins", "null")


def test_a_variable_that_cannot_be_read_is_one_message(
    image: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOCALPATH_THREADS", "many")
    assert "FOCALPATH_THREADS is 'many'" in _fails(capsys, "segment", image)


@pytest.mark.parametrize("command", ["serve.cli.main", "serve.client.segment_files.main"])
def test_ctrl_c_ends_every_wait_of_a_command(
    command: str,
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, _, _ = command.rpartition(".")
    monkeypatch.setattr(f"{module}.run_segment", lambda _: wait_while_interrupted())
    arguments = ["segment"] if module == "serve.cli" else []
    assert pkgutil.resolve_name(command)([*arguments, str(image)]) == 130
    told = capsys.readouterr().err
    assert (told.startswith("stopped"), told.count("\n")) == (True, 1)


@pytest.mark.slow
def test_services_share_no_folder_for_what_their_processes_agree_on(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what they count. BentoML's may be the user's, and another machine's as well."""
    homes: list[str] = []

    def run(*_: object) -> None:
        homes.append(os.environ[HOME_VARIABLE])
        assert Path(homes[-1]).is_dir()
        assert os.environ["BENTOML_HOME"] == homes[-1]

    monkeypatch.setitem(sys.modules, "serve.service.server", SimpleNamespace(run=run))
    command = ["http", "--bundle", str(toy_bundle), "--port", "0"]
    with patch.dict(os.environ, {"BENTOML_HOME": str(tmp_path)}):
        assert [main(command), main(command)] == [0, 0]
    assert len({*homes, str(tmp_path)}) == 3


def test_flags_come_before_the_environment(
    image: Path, toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOCALPATH_BUNDLE", str(toy_bundle))
    assert main(["segment", str(image), "--out", str(tmp_path / "out")]) == 0
    arguments = ["segment", str(image), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--bundle", str(tmp_path / "nowhere")]) == 1


def _flags(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    return set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))


def _flags_of(settings: type[InferenceSettings]) -> set[str]:
    return {f"--{name.replace('_', '-')}" for name in settings.model_fields}


def test_the_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert _flags_of(ServeSettings) <= _flags("http", capsys)


@pytest.mark.parametrize("command", ["segment", "benchmark"])
def test_the_help_of_other_commands_has_the_models_settings_only(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = _flags(command, capsys)
    assert _flags_of(InferenceSettings) <= flags
    of_the_service = {"--workers", "--api-keys-file", "--allowed-origins", "--max-waiting"}
    assert not flags & of_the_service


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--precision", "bf16"), "no ONNX file in bf16, only in fp32"),
        (("--provider", "openvino"), "OpenVINO may not run model.onnx"),
        (("--provider", "cuda"), "cuda does not run on this machine"),
    ],
)
def test_what_the_bundle_cannot_do_is_refused_before_the_service_starts(
    flags: tuple[str, ...],
    expected: str,
    toy_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # also where there is a GPU
    assert expected in _fails(capsys, "http", "--bundle", toy_bundle, *flags)


@pytest.mark.parametrize(
    ("number", "ends", "status"),
    [
        (signal.SIGTERM, "raise SystemExit(1)", 143),
        (signal.SIGHUP, "raise SystemExit(1)", 129),
        (signal.SIGTERM, "return 0", 0),
    ],
)
@pytest.mark.usefixtures("_terminal")
def test_the_status_of_a_command_that_was_told_to_end_says_so_unless_it_had_done_its_work(
    number: int, ends: str, status: int
) -> None:
    """What runs the command may make another SystemExit of ours, as Ray does."""
    script = f"""
import os, runpy, serve.cli
def main():
    try:
        os.kill(os.getpid(), {number:d})
    except SystemExit:
        {ends}
serve.cli.main = main
runpy.run_module("serve", run_name="__main__")
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == status
