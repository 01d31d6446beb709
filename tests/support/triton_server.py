"""The real Triton Inference Server for the tests, without a container or a GPU.

NVIDIA's wheel `nvidia-pytriton` carries the server and its Python backend. They are set up once in
a cache of their own, never in the application's environment, because the wheel needs numpy below 2.
`tests/triton_backends/onnxruntime` stands in for the ONNX Runtime backend, which the wheel lacks.
"""

import contextlib
import http.client
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import onnxruntime

from serve.contract.closing import Closing
from tests.support import ROOT
from tests.support.built_once import built_once
from tests.support.ports import free_ports

CACHE_VARIABLE = "FOCALPATH_TRITON_CACHE"
SERVER_PACKAGE = "nvidia-pytriton==0.7.0"  # Triton 2.51.0, 24.10
READY_TIMEOUT_S = 120
STOP_TIMEOUT_S = 120
_STARTS = 3

_STAND_INS = Path(__file__).resolve().parent / "triton_backends"
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
# With numpy 2 the stub of this server gives back empty outputs and no error.
_STUB_PACKAGES = ("numpy>=1.26,<2", f"onnxruntime=={onnxruntime.__version__}")


class TritonSetupError(RuntimeError):
    """The server could not be installed or did not start."""


class TritonAbortedError(TritonSetupError):
    """The server was ended by a signal before it was ready."""


def install_triton() -> Path:
    """Set up the server in the cache if it is not there; return its folder."""
    cache = Path(os.environ.get(CACHE_VARIABLE, ROOT / ".cache" / "triton")).resolve()
    name = f"{SERVER_PACKAGE}-python{_PYTHON}-onnxruntime{onnxruntime.__version__}"
    return built_once(cache / name.replace("==", "-"), _build)


def _build(folder: Path) -> None:
    package = folder / "package"
    venv.create(folder / "venv", symlinks=True)
    stub_python = folder / "venv" / "bin" / "python"
    pip("install", "--no-deps", "--target", str(package), SERVER_PACKAGE)
    pip("--python", str(stub_python), "install", *_STUB_PACKAGES)
    server = package / "pytriton" / "tritonserver"
    stub = server / "python_backend_stubs" / _PYTHON / "triton_python_backend_stub"
    shutil.copy2(stub, server / "backends" / "python")


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise TritonSetupError(
            f"the Triton server of the tests could not be installed: `{' '.join(command)}` ended "
            f"with status {result.returncode}:\n{result.stderr.strip()[-800:]}\n"
            "Make the package registry reachable once, or set "
            f"{CACHE_VARIABLE} to a folder where it was already set up, "
            "or leave these tests out with `pytest -m 'not triton'`."
        )


class TritonServer(Closing):
    """A Triton server on free ports of 127.0.0.1, serving a model repository.

    A context manager: ready inside, gone after. The ports stay the same when it is stopped or
    killed and started again.
    """

    def __init__(
        self,
        repository: Path,
        *,
        control_mode: Literal["none", "poll", "explicit"] = "none",
        extra_arguments: Sequence[str] = (),
    ) -> None:
        self.repository = repository
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        self._control_mode = control_mode
        self._extra_arguments = extra_arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch = Path(tempfile.mkdtemp(prefix="focalpath-triton-"))
        self._log_path = self._scratch / "server.log"

    @property
    def http_url(self) -> str:
        """Host and port of HTTP, as `tritonclient.http` takes them."""
        return f"127.0.0.1:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        """Host and port of gRPC, as `tritonclient.grpc` takes them."""
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def log(self) -> str:
        """What the server has written since it was made, over all its starts."""
        return self._log_path.read_text(errors="replace") if self._log_path.is_file() else ""

    def start(self) -> None:
        """Start the server and wait until all its models are ready.

        Where its processes stand still at the wrong moment, the server's Python backend, which
        only the tests use, aborts (boost's lock_exception): it is started again.

        Raises:
            TritonSetupError: it ended or did not get ready; the message holds its log.
        """
        for _ in range(_STARTS - 1):
            try:
                return self._start()
            except TritonAbortedError:
                continue
        return self._start()

    def _start(self) -> None:
        assert self._process is None, "the server is running"
        package = install_triton() / "package"
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(package),
                env=_environment(package),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Ask the server to end, as a supervisor does, and wait for it."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        finally:
            self.kill()

    def kill(self) -> None:
        """End the server and its backend processes at once, as a crash does."""
        if self._process is None:
            return
        regions = _shared_memory_of(self._process.pid)
        with contextlib.suppress(ProcessLookupError):  # the whole group may have ended already
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        for region in regions:
            region.unlink(missing_ok=True)

    def freeze(self) -> None:
        """Stop the server where it is: it keeps its connections and answers nothing."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP)

    def close(self) -> None:
        """End the server and remove its log."""
        self.kill()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def _command(self, package: Path) -> list[str]:
        server = package / "pytriton" / "tritonserver"
        return [
            str(server / "bin" / "tritonserver"),
            f"--model-repository={self.repository}",
            f"--backend-directory={self._backends(server)}",
            f"--model-control-mode={self._control_mode}",
            "--http-address=127.0.0.1",
            f"--http-port={self.http_port}",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={self.grpc_port}",
            "--metrics-address=127.0.0.1",
            f"--metrics-port={self.metrics_port}",
            "--allow-gpu-metrics=false",
            "--disable-auto-complete-config",
            "--strict-readiness=true",
            "--log-verbose=1",
            *self._extra_arguments,
        ]

    def _backends(self, server: Path) -> Path:
        """A folder with the server's Python backend and our stand-ins as they are now."""
        backends = self._scratch / "backends"
        shutil.rmtree(backends, ignore_errors=True)
        shutil.copytree(_STAND_INS, backends, ignore=shutil.ignore_patterns("__pycache__"))
        (backends / "python").symlink_to(server / "backends" / "python")
        return backends

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self._is_ready():
            if process.poll() is not None:
                kind = TritonAbortedError if process.returncode < 0 else TritonSetupError
                raise kind(
                    f"the Triton server ended with status {process.returncode}:\n{self._log_tail()}"
                )
            if time.monotonic() > deadline:
                raise TritonSetupError(
                    f"the Triton server was not ready in {READY_TIMEOUT_S} s:\n{self._log_tail()}"
                )
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=5)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _log_tail(self) -> str:
        return "\n".join(self.log.splitlines()[-60:])


def _environment(package: Path) -> dict[str, str]:
    virtual_environment = package.parent / "venv"
    environment = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    return environment | {
        # The stub takes its packages from the first `python` on the path.
        "PATH": f"{virtual_environment / 'bin'}:/usr/bin:/bin",
        # The stub must load the libpython of this Python, and not another one of the system.
        "LD_LIBRARY_PATH": str(sysconfig.get_config_var("LIBDIR")),
        "PYTHONDONTWRITEBYTECODE": "1",
        "ORT_DISABLE_TELEMETRY": "1",  # the stand-in imports onnxruntime, and not `serve`
    }


def _shared_memory_of(pid: int) -> set[Path]:
    """The server's regions for its Python backends: a process that is killed leaves them behind."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        maps = Path(f"/proc/{pid}/maps").read_text().split()
        return {Path(word) for word in maps if word.startswith("/dev/shm/triton_")}
    return set()
