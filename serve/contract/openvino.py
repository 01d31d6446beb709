"""OpenVINO's own runtime on the CPU, for AMD and Intel alike.

It runs the bundle's bfloat16 graph, which ONNX Runtime's CPU provider cannot, and which processors
with bfloat16 instructions answer much faster than the float32 one. The gate of the export and the
service compile graphs with this one class, so what was measured is what answers.
"""

import queue
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import BackendUnavailableError, BundleError

GraphPrecision = Literal["bf16", "fp32"]
"""Precision of a graph that OpenVINO may run."""

PACKAGE = "openvino"
_HINTS = {"bf16": "bf16", "fp32": "f32"}


class OpenVinoModel:
    """A graph that is compiled for the CPU; many threads may run it at once.

    Args:
        path: the ONNX file.
        precision: of the graph. Without this hint OpenVINO computes a float32 graph in bfloat16
            too, down to the last norm, and changes labels.
        threads: CPU threads for one inference; 0 takes one per core.
        parallel: inferences that run at the same time.

    Raises:
        BackendUnavailableError: OpenVINO is not installed or finds no CPU, or the graph is in
            bfloat16 and the processor has no instructions for it.
        BundleError: OpenVINO cannot read or compile the file.
    """

    def __init__(
        self, path: Path, precision: GraphPrecision, *, threads: int = 0, parallel: int = 1
    ) -> None:
        core = _core()
        if precision == "bf16" and not computes_bfloat16():
            raise BackendUnavailableError(
                f"{core.get_property('CPU', 'FULL_DEVICE_NAME')} has no instructions for bfloat16 "
                "(AVX512_BF16 or AMX), so OpenVINO gains nothing by it. Set "
                "FOCALPATH_PRECISION=fp32."
            )
        try:
            self._compiled = core.compile_model(
                str(path), "CPU", _settings(precision, threads, parallel)
            )
        except RuntimeError as error:
            raise BundleError(
                f"{path} cannot be compiled by OpenVINO {version()}: {_reason(error)}. "
                "Choose FOCALPATH_PROVIDER=cpu, or export the checkpoint again."
            ) from error
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run(self, images: NDArray[np.uint8], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Run the graph on (B, T, T, 3) uint8 RGB images, and copy out the named outputs.

        OpenVINO computes the other outputs as well; they take about a hundredth of the time.

        Raises:
            BackendUnavailableError: the run failed.
        """
        try:
            request = self._requests.get_nowait()
        except queue.Empty:
            request = self._compiled.create_infer_request()
        try:
            request.infer({"image": np.ascontiguousarray(images)}, share_inputs=True)
            return {name: request.get_tensor(name).data.copy() for name in outputs}
        except RuntimeError as error:
            raise BackendUnavailableError(
                f"OpenVINO failed on a batch of {len(images)} tiles: {_reason(error)}. "
                "Check this machine's free memory, or set a smaller FOCALPATH_CONCURRENCY."
            ) from error
        finally:
            self._requests.put(request)


def computes_bfloat16() -> bool:
    """Whether this machine's processor has instructions for bfloat16.

    Raises:
        BackendUnavailableError: OpenVINO is not installed or finds no CPU.
    """
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def is_usable(precision: str) -> bool:
    """Whether OpenVINO is installed, finds a CPU, and that CPU computes in this precision."""
    try:
        return "CPU" in _core().available_devices and (precision != "bf16" or computes_bfloat16())
    except BackendUnavailableError:
        return False


def version() -> str:
    """OpenVINO's version.

    Raises:
        BackendUnavailableError: OpenVINO is not installed.
    """
    return str(_module().__version__).split("-", maxsplit=1)[0]


def _settings(precision: GraphPrecision, threads: int, parallel: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": parallel,
        # Pinned threads of two processes would share the first cores and leave the others idle.
        "ENABLE_CPU_PINNING": False,
    }
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads * parallel  # of all streams together
    return settings


def _reason(error: RuntimeError) -> str:
    """What OpenVINO's error says, without the lines that name its own source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (told or lines or [type(error).__name__])[-1].rstrip(".")


def _module() -> Any:
    try:
        return import_module("openvino")
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f"OpenVINO is not installed. Run `pip install {PACKAGE}` in this environment, or do "
            "without it: choose another FOCALPATH_PROVIDER to serve, leave out --openvino to "
            "export."
        ) from error


@cache
def _core() -> Any:
    core = _module().Core()
    if "CPU" not in core.available_devices:
        raise BackendUnavailableError(
            f"OpenVINO {version()} finds no CPU device on this machine, only "
            f"{', '.join(core.available_devices) or 'none'}. Choose another FOCALPATH_PROVIDER."
        )
    return core
