"""ONNX Runtime on an NVIDIA GPU, as the export's gate, the service and the benchmarks open it."""

import ctypes
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from serve.contract.errors import BackendUnavailableError
from serve.contract.machine import visible_gpus

PROVIDER = "CUDAExecutionProvider"
"""ONNX Runtime's name of its provider."""
_LIBRARIES = ("cudart", "nvrtc", "cublasLt", "cublas", "curand", "cufft", "cudnn")
"""What the provider needs, in the order in which one needs the other."""
_UNUSABLE = (RuntimeError, ort.EPFail, ort.Fail, ort.RuntimeException)
"""What opening a session raises where the GPU, its driver or its memory do not suffice."""
_FAILURE = re.compile(r"\b(?:CU\w+|CUDNN) failure \d+: [^;\n]+")
"""What CUDA's libraries say, between the names of ONNX Runtime's functions and files."""
_NO_MEMORY = ("out of memory", "Failed to allocate memory", "ALLOC_FAILED")
"""What the messages of CUDA, of ONNX Runtime and of cuBLAS and cuDNN have in common."""


def is_built_in() -> bool:
    """Whether the installed ONNX Runtime was built for CUDA, not whether there is a GPU."""
    return PROVIDER in onnxruntime.get_available_providers()


def open_session(
    path: Path,
    options: onnxruntime.SessionOptions | None = None,
    settings: Mapping[str, str] | None = None,
) -> Any:
    """Open a graph on the GPU, with the CPU for the nodes that CUDA lacks.

    Args:
        path: the ONNX file.
        options: of the session.
        settings: of the provider, such as `use_tf32`.

    Raises:
        BackendUnavailableError: ONNX Runtime lacks CUDA, or CUDA does not work on this machine.
    """
    if not is_built_in():
        available = ", ".join(onnxruntime.get_available_providers())
        raise BackendUnavailableError(
            f"ONNX Runtime {onnxruntime.__version__} has no CUDA, only {available}. Install "
            "onnxruntime-gpu in place of onnxruntime, or choose another provider with "
            "FOCALPATH_PROVIDER."
        )
    load_libraries()
    providers = [(PROVIDER, dict(settings or {})), "CPUExecutionProvider"]
    try:
        # By itself it would print the error, compute on the CPU, and do so for good after one
        # failure of the GPU.
        session = onnxruntime.InferenceSession(
            path, options, providers=providers, enable_fallback=False
        )
    except _UNUSABLE as error:
        raise BackendUnavailableError(
            f"ONNX Runtime {onnxruntime.__version__} cannot use CUDA for {path.name}: "
            f"{reason_of(error)}. {_advice()}"
        ) from error
    if session.get_providers()[0] != PROVIDER:
        raise BackendUnavailableError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load its CUDA provider; its log says "
            f"which library is missing. It needs CUDA {_cuda_version()} and cuDNN 9. {_advice()}"
        )
    return session


@cache
def load_libraries() -> None:
    """Load CUDA and cuDNN where pip installed them, so that ONNX Runtime finds them.

    `onnxruntime.preload_dlls` looks beside its own package only, and prints what it misses.
    Libraries that are not found here are left to the system's own search.
    """
    spec = find_spec("nvidia")
    for root in (spec and spec.submodule_search_locations) or ():
        for library in _LIBRARIES:
            for path in sorted(Path(root).glob(f"*/lib/lib{library}.so.*")):
                with suppress(OSError):  # of another CUDA: opening the session tells
                    ctypes.CDLL(str(path))


def reason_of(error: Exception) -> str:
    """What an error of ONNX Runtime on the GPU says, in one line and without a full stop."""
    if any(sign in str(error) for sign in _NO_MEMORY):
        return "the GPU's memory is full"
    if failures := _FAILURE.findall(str(error)):
        return str(failures[-1]).strip()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(".")


def _cuda_version() -> str:
    with suppress(ImportError, AttributeError):
        from onnxruntime.capi import build_and_package_info

        return str(build_and_package_info.cuda_version)
    return "12 or 13"


def _advice() -> str:
    gpus = visible_gpus()
    if not gpus:
        return (
            "NVIDIA's driver shows no GPU on this machine (`nvidia-smi`). Choose "
            "FOCALPATH_PROVIDER=cpu."
        )
    found = ", ".join(f"{gpu.name} with driver {gpu.driver}" for gpu in gpus)
    return (
        f"This machine has {found}. Check its free memory, its driver and the libraries, or choose "
        "FOCALPATH_PROVIDER=cpu."
    )
