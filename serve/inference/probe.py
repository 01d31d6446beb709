"""Checks that a provider works on this machine: runs a tiny graph on it, in another process.

An installed provider may still lack a driver, a library or an instruction set. The graph runs in
another process, since some providers end their process when they fail, and CUDA keeps its memory.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from serve.contract import cuda
from serve.contract.errors import BackendUnavailableError, FocalPathError
from serve.contract.openvino import OpenVinoModel
from serve.contract.openvino import version as openvino_version
from serve.contract.strict import Strict
from serve.contract.tiny_graph import TINY_GRAPH, is_right, tiny_images
from serve.inference.backend import first_line
from serve.inference.onnxruntime import OPEN_ERRORS, RUN_ERRORS
from serve.settings import InferenceSettings

PROVIDERS = ("cpu", "cuda", "openvino")
_TIMEOUT_S = 120


class Probe(Strict):
    """Result of running the graph on a provider."""

    provider: str
    runtime: str | None
    """Name and version; None where it is not installed."""
    seconds: float | None
    """To start the runtime and run the graph; None where that failed."""
    problem: str | None
    """Why it does not run."""


def probe(provider: str, precision: str = "fp32") -> Probe:
    """Run the graph on a provider in another process."""
    command = [sys.executable, "-m", "serve.inference.probe", provider, precision]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return _failed(provider, f"it did not answer within {_TIMEOUT_S} s")
    seconds = time.perf_counter() - started
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        return _failed(provider, f"its process ended with status {done.returncode}: {last}")
    found = Probe.model_validate_json(lines[-1])
    return found if found.problem else found.model_copy(update={"seconds": seconds})


def check_provider(settings: InferenceSettings) -> None:
    """Check that the provider named in the settings runs on this machine.

    Raises:
        BackendUnavailableError: it does not run.
    """
    if settings.backend != "onnxruntime" or settings.provider in ("auto", "cpu"):
        return
    found = probe(settings.provider, settings.precision)
    if found.problem:
        raise BackendUnavailableError(
            f"the provider {settings.provider} does not run on this machine: {found.problem} "
            "Choose --provider auto or cpu, or install what is missing; `python -m serve doctor` "
            "tries all."
        )


def run_here(provider: str, precision: str) -> Probe:
    """Run the graph on a provider in this process."""
    image = tiny_images()
    runtime: str | None = None
    with tempfile.TemporaryDirectory(prefix="focalpath-probe-") as folder:
        path = Path(folder) / "probe.onnx"
        path.write_bytes(TINY_GRAPH)
        try:
            if provider == "openvino":
                runtime = f"OpenVINO {openvino_version()}"
                model = OpenVinoModel(path, "bf16" if precision == "bf16" else "fp32")
                labels = model.run(image, ("labels",))["labels"]
            else:
                runtime = f"ONNX Runtime {onnxruntime.__version__}"
                labels = _in_onnxruntime(path, provider, image)
        except FocalPathError as error:
            return _failed(provider, str(error), runtime)
    if not is_right(labels):
        return _failed(provider, "it runs, and answers wrongly.", runtime)
    return Probe(provider=provider, runtime=runtime, seconds=None, problem=None)


def _in_onnxruntime(path: Path, provider: str, image: NDArray[np.uint8]) -> NDArray[Any]:
    try:
        session: Any = (
            cuda.open_session(path)
            if provider == "cuda"
            else onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        )
        labels: NDArray[Any] = session.run(["labels"], {"image": image})[0]
    except (RuntimeError, *OPEN_ERRORS, *RUN_ERRORS) as error:
        raise BackendUnavailableError(f"{first_line(error)}.") from error
    return labels


def _failed(provider: str, problem: str, runtime: str | None = None) -> Probe:
    return Probe(provider=provider, runtime=runtime, seconds=None, problem=problem)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run_here(*sys.argv[1:3]).model_dump()) + "\n")
