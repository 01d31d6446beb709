"""NVIDIA's real Python bindings of TensorRT, importable without its libraries or a GPU.

The wheels hold one extension module, which needs nine C functions of the libraries only when it is
used. Empty libraries of the same names, compiled here, let it be imported and introspected.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT
from tests.support.built_once import built_once

CACHE_VARIABLE = "FOCALPATH_TENSORRT_CACHE"
PACKAGES = {
    "10.16": "tensorrt-cu13-bindings==10.16.*",
    "11.4": "tensorrt-cu13-bindings==11.4.*",
}

_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
_FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


class BindingsError(RuntimeError):
    """The bindings could not be installed, or their libraries could not be stubbed."""


def install_bindings(version: str) -> Path:
    """Install one version of the wheel in the cache if it is not there; return its folder."""
    cache = Path(os.environ.get(CACHE_VARIABLE, ROOT / ".cache" / "tensorrt")).resolve()
    folder = cache / f"bindings-{version}-python{_PYTHON}"
    return built_once(folder, lambda building: _pip_install(PACKAGES[version], building))


def compile_stubs(version: str, folder: Path) -> Path:
    """Compile empty libraries of the names that the bindings load; return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "stubs.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in _FUNCTIONS))
    major = version.split(".")[0]
    for library in _LIBRARIES:
        file = f"lib{library}.so.{major}"
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", file, source.name]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise BindingsError("gcc is missing: install a C compiler for these tests") from error
        except subprocess.CalledProcessError as error:
            raise BindingsError(f"`{' '.join(command)}` failed:\n{error.stderr}") from error
    return folder


def _pip_install(package: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install"]
    command += ["--no-deps", "--only-binary", ":all:", "--target", str(folder), package]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        shutil.rmtree(folder, ignore_errors=True)
        raise BindingsError(
            f"TensorRT's bindings could not be installed: `{' '.join(command)}` ended with status "
            f"{result.returncode}:\n{result.stderr.strip()[-800:]}\n"
            f"Make the package registry reachable once, or set {CACHE_VARIABLE} to a folder where "
            "they were already installed, or leave these tests out with `pytest -m 'not tensorrt'`."
        )
