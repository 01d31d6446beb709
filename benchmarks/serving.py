"""`make benchmark`: the benchmark of serving, with the tests' Triton and its perf_analyzer.

Arguments are those of `python -m serve benchmark`. Where either cannot be installed or started, the
rest is measured and the report says what was left out.
"""

import shutil
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from export.errors import FocalPathError
from export.triton import publish
from serve.cli import main as serve
from tests.support.triton_server import TritonServer, TritonSetupError, install_triton, pip

CLIENT_PACKAGE = "tritonclient==2.51.0"  # later ones need glibc 2.38
NOTE = (
    "Triton is the real server, 2.51, with the tests' stand-in for its ONNX Runtime backend, in "
    "Python: its rows show what the transports cost beside each other, and nothing of the speed of "
    "Triton's own C++ backend."
)
_LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}


def install_perf_analyzer() -> Path:
    """A script that runs perf_analyzer with the libraries of the tests' Triton."""
    server = install_triton()
    folder = server.parent / CLIENT_PACKAGE.replace("==", "-")
    script = folder / "perf_analyzer.sh"
    if script.is_file():
        return script
    with tempfile.TemporaryDirectory(dir=server.parent, prefix=".perf-") as name:
        building = Path(name) / "built"
        building.mkdir()
        pip("download", "--no-deps", "--dest", name, CLIENT_PACKAGE)
        (wheel,) = Path(name).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (one for one in archive.namelist() if one.endswith("/bin/perf_analyzer"))
            (building / "perf_analyzer").write_bytes(archive.read(member))
        for link, pattern in _LIBRARIES.items():
            (library,) = (server / "package" / "nvidia_pytriton.libs").glob(pattern)
            (building / link).symlink_to(library)
        (building / "perf_analyzer").chmod(0o755)
        (building / script.name).write_text(
            f'#!/bin/sh\nLD_LIBRARY_PATH={folder} exec {folder}/perf_analyzer "$@"\n'
        )
        (building / script.name).chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
    return script


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark with what can be had."""
    extra: list[str] = []
    with ExitStack() as stack:
        repository = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="focalpath-")))
        try:
            publish(_bundle(arguments), repository)
            server = stack.enter_context(TritonServer(repository))
            extra += ["--triton-url", server.grpc_url, "--triton-http-url", server.http_url]
            extra += ["--triton-note", NOTE, "--perf-analyzer", str(install_perf_analyzer())]
        except (TritonSetupError, FocalPathError, OSError, ValueError) as error:
            print(f"without all of Triton: {error}", file=sys.stderr)
        return serve(["benchmark", *extra, *arguments])


def _bundle(arguments: Sequence[str]) -> Path:
    flags = dict(zip(arguments, arguments[1:], strict=False))
    return Path(flags.get("--bundle", "artifacts/bundle"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
