import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from export.__main__ import main
from export.tensorrt.container import CHECKOUT, ContainerBuild
from export.tensorrt.plan import plan_for, read_engine_plan
from serve.contract.manifest import read_bundle
from tests.support.commands import failed_export
from tests.support.fake_tensorrt import FakeGpu, FakeTensorRT

A100 = "NVIDIA A100-SXM4-80GB, 8.0, 81920, 570.86.15\n"
H200 = "NVIDIA H200, 9.0, 143771, 570.86.15\n"


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


class Replaced(Exception):
    """In place of the process that would run instead of this one."""


Pretend = Callable[..., list[list[str]]]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """A machine with docker and these GPUs; gives the commands that were run there."""
    commands: list[list[str]] = []

    def prepare(gpus: str = A100, build_status: int = 0) -> list[list[str]]:
        def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
            if command[0] == "nvidia-smi":
                return subprocess.CompletedProcess(command, 0, stdout=gpus)
            commands.append(list(command))
            return subprocess.CompletedProcess(command, build_status)

        def replace(file: str, command: list[str]) -> None:
            commands.append(list(command))
            raise Replaced

        monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(os, "execvp", replace)
        return commands

    return prepare


def _command(bundle: Path, **options: object) -> ContainerBuild:
    settings = {"data": None} | options
    return ContainerBuild(read_engine_plan(bundle), bundle, **settings)  # type: ignore[arg-type]


def test_on_the_wrong_machine_it_ends_with_status_2_and_the_one_line_to_type(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(bundle.iterdir())
    assert failed_export("engine", bundle) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[0].startswith("error: TensorRT cannot be imported on this machine")
    build, run = lines[-1].split(" && ")
    assert shlex.split(build)[:4] == ["docker", "build", "--target", "export"]
    assert build.endswith(f"TENSORRT=nvcr.io/nvidia/tensorrt:26.06-py3 {CHECKOUT}")
    assert '--user "$(id -u):$(id -g)"' in run
    assert run.endswith("focalpath-export:26.06-py3 engine /bundle --num-tiles 4")
    assert sorted(bundle.iterdir()) == before


def test_an_installed_focalpath_asks_for_its_source_instead(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, pretend: Pretend
) -> None:
    monkeypatch.setattr("export.tensorrt.container.CHECKOUT", bundle)
    line = str(_command(bundle))
    assert "Get its source" in line
    assert line.endswith(f"python -m export engine {bundle} --docker")
    commands = pretend()
    assert failed_export("engine", bundle, "--docker") == 2
    assert commands == []


def test_it_builds_for_the_server_and_compares_with_the_masks_that_it_is_given(
    bundle: Path,
    toy_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("export.tensorrt.engine.load_tensorrt", lambda: FakeTensorRT("11.4.0.106"))
    monkeypatch.setattr("export.tensorrt.engine.Gpu.find", lambda: FakeGpu("9.0"))
    monkeypatch.setattr("export.tensorrt.session.MEASURED_RUNS", 3)
    server = ("--compute-capability", "9.0", "--tensorrt-version", "11.4")
    data = ("--validate", str(toy_data), "--num-tiles", "3")
    main(["engine", str(bundle), *server, *data])
    shown = capsys.readouterr().out
    assert "model.plan: built, and passed the gate" in shown
    assert "batch 8: p50 " in shown
    report = (bundle / "engine_report.json").read_text()
    assert '"has_masks": true' in report
    assert '"num_tiles": 3' in report
    build = read_bundle(bundle).artefacts[-1].tensorrt
    assert build is not None
    assert (build.version, build.compute_capability) == ("11.4.0.106", "9.0")


class TestDocker:
    def test_the_image_is_made_and_then_takes_the_place_of_this_process(
        self, bundle: Path, pretend: Pretend
    ) -> None:
        commands = pretend(gpus=H200 + A100)  # one of the planned kind is enough
        with pytest.raises(Replaced):
            main(["engine", str(bundle), "--docker"])
        image, plan = commands
        assert image[:4] == ["docker", "build", "--target", "export"]
        assert plan[:4] == ["docker", "run", "--rm", "--init"]
        assert plan[plan.index("--user") + 1] == f"{os.getuid()}:{os.getgid()}"
        assert f"{bundle}:/bundle" in plan

    def test_the_container_gets_the_data_set_and_the_options(
        self, bundle: Path, toy_data: Path, pretend: Pretend
    ) -> None:
        commands = pretend(gpus=H200)
        options = ["--num-tiles", "3", "--compute-capability", "9.0"]
        with pytest.raises(Replaced):
            main(["engine", str(bundle), "--docker", "--validate", str(toy_data), *options])
        mount = f"/data/{toy_data.name}"
        assert f"{toy_data}:{mount}:ro" in commands[-1]
        assert commands[-1][-8:] == ["engine", "/bundle", "--validate", mount, *options]

    @pytest.mark.parametrize("is_terminal", [False, True])
    def test_the_container_has_a_terminal_where_the_user_has_one(
        self, bundle: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
    ) -> None:
        monkeypatch.setattr("sys.stdin.isatty", lambda: is_terminal, raising=False)
        monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
        assert ({"--interactive", "--tty"} <= set(_command(bundle).plan)) is is_terminal

    @pytest.mark.parametrize(
        ("gpus", "said"), [(H200, "NVIDIA H200 has compute capability 9.0"), ("", "TensorRT")]
    )
    def test_without_a_gpu_of_the_planned_kind_nothing_is_pulled(
        self,
        bundle: Path,
        pretend: Pretend,
        capsys: pytest.CaptureFixture[str],
        gpus: str,
        said: str,
    ) -> None:
        commands = pretend(gpus=gpus)
        assert failed_export("engine", bundle, "--docker") == 2
        assert said in capsys.readouterr().err
        assert commands == []

    def test_an_image_that_cannot_be_made_leaves_the_command_to_the_user(
        self, bundle: Path, pretend: Pretend, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pretend(build_status=1)
        assert failed_export("engine", bundle, "--docker") == 2
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith("docker build")

    def test_without_docker_the_flag_changes_nothing(
        self, bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "which", lambda name: None)
        assert failed_export("engine", bundle, "--docker") == 2
