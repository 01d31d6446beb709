"""The image's install steps, run for real into an empty environment."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support import ROOT
from tests.support.deployed import dockerfile_stage
from tests.support.http_service import service_process, wait_until_ready
from tests.support.pictures import blobs, encoded

pytestmark = pytest.mark.slow

IMPORT_ALL = """
import importlib, pkgutil, serve
# Of the extras slides, dicom and cluster.
extras = {"imagecodecs", "openslide", "orjson", "pydicom", "ray", "tifffile", "zarr"}
rooms = ("serve.slides.", "serve.service.slides.", "serve.images.readers.")
for module in pkgutil.walk_packages(serve.__path__, "serve."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if error.name not in extras or not module.name.startswith(rooms):
            raise
print(serve.__file__)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the Dockerfile's stage `serve-environment` makes of a copy of what it copies."""
    source, environment = (tmp_path_factory.mktemp("image") / name for name in ("source", "venv"))
    source.mkdir()
    for line in dockerfile_stage("serve-environment"):
        instruction, _, rest = line.partition(" ")
        if instruction == "COPY" and "--from=" not in rest:
            for name in rest.split()[:-1]:
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
                copy(ROOT / name, source / name)
        elif instruction == "RUN":
            command = rest.replace("/opt/focalpath", str(environment))
            command = re.sub(r"^pip ", f"{sys.executable} -m pip ", command.strip())
            command = re.sub(r"^python ", f"{sys.executable} ", command)
            # The packages that were downloaded before are taken from the cache.
            command = command.replace("--no-cache-dir", "--no-compile --disable-pip-version-check")
            subprocess.run(command, shell=True, cwd=source, check=True)
    return environment


def _run(environment: Path, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [environment / "bin" / "python", "-I", "-c", script],
        cwd=environment,
        capture_output=True,
        text=True,
    )


def test_all_of_serve_can_be_imported_without_torch_and_pip(environment: Path) -> None:
    imported = _run(environment, IMPORT_ALL)
    assert imported.returncode == 0, imported.stderr
    assert str(environment) in imported.stdout
    for absent in ("torch", "pip", "setuptools"):
        assert "ModuleNotFoundError" in _run(environment, f"import {absent}").stderr


def test_the_installed_service_shows_its_page_and_answers_a_request(
    environment: Path, toy_bundle: Path, tmp_path: Path
) -> None:
    python = environment / "bin" / "python"
    with service_process(toy_bundle, tmp_path / "log.txt", python=python) as (url, _):
        wait_until_ready(url)
        page = httpx.get(f"{url}/", headers={"Accept": "text/html"})
        assert page.headers["content-type"].startswith("text/html")
        answer = httpx.post(f"{url}/segment", files={"image": encoded(blobs(20, 20))})
        assert answer.status_code == 200


def test_the_installed_command_segments_a_file(
    environment: Path, toy_bundle: Path, tmp_path: Path
) -> None:
    image, out = tmp_path / "blobs.png", tmp_path / "out"
    image.write_bytes(encoded(blobs(20, 20)))
    command = [environment / "bin" / "focalpath-segment", image, "--url", toy_bundle, "--out", out]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (out / "blobs.labels.png").is_file()
