import re

import pytest

from export.tensorrt.plan import RELEASE
from tests.support import ROOT


def _stage(name: str) -> list[str]:
    """The instructions of a stage, one a line."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    (stage,) = re.findall(rf"^FROM \S+ AS {name}\n.*?(?=^FROM |\Z)", text, re.DOTALL | re.MULTILINE)
    return [line for line in stage.splitlines() if line.strip() and not line.startswith("#")]


def test_engines_are_built_with_the_tensorrt_that_they_were_planned_for() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r"^ARG TENSORRT=(\S+)$", text, re.MULTILINE) == [
        f"nvcr.io/nvidia/tensorrt:{RELEASE}-py3"
    ]
    assert _stage("export")[0] == "FROM ${TENSORRT} AS export"


@pytest.mark.parametrize("name", ["train", "export"])
def test_an_image_takes_its_own_extra_in_the_pinned_versions(name: str) -> None:
    (install,) = [line for line in _stage(name) if "pip install" in line]
    assert "--constraint constraints.txt" in install
    assert f"'.[{name}]'" in install


@pytest.mark.parametrize("name", ["train", "export"])
def test_an_image_runs_its_command_as_a_user_without_rights(name: str) -> None:
    stage = _stage(name)
    assert [line for line in stage if line.startswith("USER ")] == ["USER 10001:10001"]
    assert re.fullmatch(rf'ENTRYPOINT \["python3?", "-m", "{name}"\]', stage[-1])


@pytest.mark.parametrize("name", ["train", "export"])
def test_an_image_copies_only_what_the_build_may_see(name: str) -> None:
    allowed = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
        if line.startswith("!")
    }
    copied = [
        source for line in _stage(name) if line.startswith("COPY ") for source in line.split()[1:-1]
    ]
    assert {"constraints.txt", "train", "export", "serve"} <= set(copied) <= allowed
    assert all((ROOT / source).exists() for source in copied)
