"""OpenVINO's own runtime on the CPU, for both AMD and Intel.

It runs the bundle's bfloat16 graph, which ONNX Runtime's CPU provider cannot run. Processors with
bfloat16 instructions run it much faster than the float32 one. The export's gate and the service
both compile graphs with this class, so the service runs exactly what the gate measured.
"""

import os
import queue
import sys
import threading
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import BackendUnavailableError, BundleError
from serve.contract.machine import this_processor
from serve.contract.tiny_graph import TINY_GRAPH, is_right, tiny_images

GraphPrecision = Literal["bf16", "fp32"]
"""Precision of a graph that OpenVINO may run."""

PACKAGE = "openvino"
_BEFORE_AVX512 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2")
"""Instruction sets as oneDNN names them."""
_opening_core = threading.Lock()
_HINTS = {"bf16": "bf16", "fp32": "f32"}


class OpenVinoModel:
    """A graph that is compiled for the CPU; many threads may run it at once.

    Args:
        path: the ONNX file.
        precision: of the graph. Without this hint OpenVINO computes a float32 graph in bfloat16
            too, up to the last norm, and changes labels.
        threads: CPU threads for one inference; 0 takes one per core.
        parallel: inferences that run at the same time.

    Raises:
        BackendUnavailableError: OpenVINO is not installed, or does not run a graph of this
            precision on this machine.
        BundleError: OpenVINO cannot read or compile the file.
    """

    def __init__(
        self, path: Path, precision: GraphPrecision, *, threads: int = 0, parallel: int = 1
    ) -> None:
        require(precision)
        try:
            self._compiled = _core().compile_model(
                str(path), "CPU", _settings(precision, threads, parallel)
            )
        except RuntimeError as error:
            raise BundleError(
                f"{path} cannot be compiled by OpenVINO {version()}: {_reason(error)}. "
                "Choose FOCALPATH_PROVIDER=cpu, or export the checkpoint again."
            ) from error
        self.interface: list[tuple[str, str, tuple[int, ...]]] = [
            (
                port.get_any_name(),
                port.get_element_type().get_type_name(),
                tuple(side.get_length() if side.is_static else -1 for side in port.partial_shape),
            )
            for port in (*self._compiled.inputs, *self._compiled.outputs)
        ]
        """Name, OpenVINO's type and shape of each input and output; -1 is any number."""
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run(self, images: NDArray[np.uint8], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Run the graph on (B, T, T, 3) uint8 RGB images, and copy out the named outputs.

        OpenVINO computes the other outputs as well: a compiled model has one set of outputs.

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


@cache
def problem(precision: GraphPrecision) -> str | None:
    """Why OpenVINO cannot run a graph of this precision on this machine; None where it can.

    A tiny graph is run: a processor's capabilities do not tell all, as where `ONEDNN_MAX_CPU_ISA`
    takes instruction sets away.
    """
    try:
        core = _core()
    except BackendUnavailableError as error:
        return str(error)
    processor = core.get_property("CPU", "FULL_DEVICE_NAME")
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return (
            f"{processor} has no instructions for bfloat16 (AVX512_BF16 or AMX), so OpenVINO gains "
            "nothing by it. Set FOCALPATH_PRECISION=fp32."
        )
    try:
        model = core.read_model(TINY_GRAPH)
        request = core.compile_model(
            model, "CPU", _settings(precision, 1, 1)
        ).create_infer_request()
        request.infer({"image": tiny_images()})
        labels = request.get_tensor("labels").data.copy()
    except RuntimeError as error:
        return (
            f"OpenVINO {version()} does not compute in {precision} on {processor}: "
            f"{_reason(error)}. Choose another FOCALPATH_PROVIDER or FOCALPATH_PRECISION."
        )
    return None if is_right(labels) else f"OpenVINO {version()} computes wrongly on {processor}."


def require(precision: GraphPrecision) -> None:
    """Raise BackendUnavailableError where OpenVINO cannot run a graph of this precision."""
    found = problem(precision)
    if found is not None:
        raise BackendUnavailableError(found)


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
    # Imported with this package, OpenVINO sends usage data to its maker, writes an id into the home
    # folder, and fails where there is none. Without it, it does none of that.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return import_module("openvino")
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f"OpenVINO is not installed. Run `pip install {PACKAGE}` in this environment, or do "
            "without it: choose another FOCALPATH_PROVIDER to serve, leave out --openvino to "
            "export."
        ) from error


def _core() -> Any:
    """The process's one core; a cache alone lets threads that ask at once open one each."""
    with _opening_core:
        return _one_core()


@cache
def _one_core() -> Any:
    """A core, which is never closed.

    Each core gives the thread that opens it a stack for signals. Two of them, closed in the order
    in which they were opened, leave one that is unmapped, and the next signal kills the process
    (seen with 2026.4.1).
    """
    module = _module()
    _refuse_mask()
    core = module.Core()
    if "CPU" not in core.available_devices:
        raise BackendUnavailableError(
            f"OpenVINO {version()} finds no CPU device on this machine, only "
            f"{', '.join(core.available_devices) or 'none'}. Choose another FOCALPATH_PROVIDER."
        )
    return core


def _refuse_mask() -> None:
    """Refuse an environment that hides AVX-512 from a part of OpenVINO.

    oneDNN's kernels in it obey `ONEDNN_MAX_CPU_ISA`, its own do not, and together they answer
    wrongly or crash the process (seen with 2026.4.1 on a processor with AVX-512).

    Raises:
        BackendUnavailableError: the mask is set on such a processor.
    """
    if "avx512" not in this_processor().instruction_sets:
        return
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        value = os.environ.get(name, "")
        if value.upper() in _BEFORE_AVX512:
            raise BackendUnavailableError(
                f"{name}={value} hides instruction sets from a part of OpenVINO only, which then "
                "computes wrongly. Unset it, or choose another FOCALPATH_PROVIDER."
            )
