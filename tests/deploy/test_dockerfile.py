import re

import pytest

from export.tensorrt.plan import RELEASE
from tests.support import ROOT
from tests.support.deployed import dockerfile_stage

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
BUILT_FROM_SOURCE = ("train", "export", "serve-environment")


def test_engines_are_built_with_the_tensorrt_that_they_were_planned_for() -> None:
    assert re.findall(r"^ARG TENSORRT=(\S+)$", TEXT, re.MULTILINE) == [
        f"nvcr.io/nvidia/tensorrt:{RELEASE}-py3"
    ]
    assert dockerfile_stage("export")[0] == "FROM ${TENSORRT} AS export"


def test_pythons_version_is_pinned() -> None:
    (python,) = re.findall(r"^ARG PYTHON=(\S+)$", TEXT, re.MULTILINE)
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-[a-z-]+", python)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("train", "'.[train]'"),
        ("export", "'.[export]'"),
        ("serve-environment", '".[${SERVE_EXTRAS:-serve,tracing}]"'),
    ],
)
def test_an_image_takes_its_own_extra_in_the_pinned_versions(name: str, extra: str) -> None:
    (install,) = [line for line in dockerfile_stage(name) if " install " in line and "pip" in line]
    assert "--constraint constraints.txt" in install
    assert extra in install


@pytest.mark.parametrize("name", ["train", "export", "serve"])
def test_an_image_runs_its_command_as_a_user_without_rights(name: str) -> None:
    stage = dockerfile_stage(name)
    assert [line for line in stage if line.startswith("USER ")] == ["USER 10001:10001"]
    (command,) = [line for line in stage if line.startswith("ENTRYPOINT ")]
    assert re.fullmatch(rf'ENTRYPOINT \["python3?", "-m", "{name}"\]', command)


def test_the_image_of_the_service_is_watched_and_has_no_installer() -> None:
    stage = dockerfile_stage("serve")
    assert any(line.startswith("HEALTHCHECK ") for line in stage)
    assert any("uninstall --yes" in line and " pip" in line for line in stage)
    assert not any("apt-get" in line or "pip install" in line for line in stage)


@pytest.mark.parametrize("name", BUILT_FROM_SOURCE)
def test_an_image_copies_only_what_the_build_may_see(name: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    allowed = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copies = [
        line.split()
        for line in dockerfile_stage(name)
        if line.startswith("COPY ") and "--from=" not in line
    ]
    copied = {source for words in copies for source in words[1:-1]}
    assert {"constraints.txt", "train", "export", "serve"} <= copied <= allowed
    assert all((ROOT / source).exists() for source in copied)
