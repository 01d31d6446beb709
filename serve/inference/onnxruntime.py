"""ONNX Runtime as a backend: one of the bundle's graphs on this machine's CPU or GPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from serve.contract.errors import BackendUnavailableError, BundleError
from serve.contract.manifest import Manifest
from serve.inference.backend import first_line, in_batches, onnx_artefact

OPEN_ERRORS = (
    ort.EPFail,
    ort.Fail,
    ort.InvalidArgument,
    ort.InvalidGraph,
    ort.InvalidProtobuf,
    ort.NoSuchFile,
    ort.NotImplemented,
)
RUN_ERRORS = (
    ort.EPFail,
    ort.EngineError,
    ort.Fail,
    ort.InvalidArgument,
    ort.NotImplemented,
    ort.RuntimeException,
)
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

OnnxRuntimeProvider = Literal["cpu", "cuda"]


class OnnxRuntimeBackend:
    """Runs a bundle's ONNX file in this process.

    Args:
        bundle: the bundle's folder.
        manifest: its manifest.
        precision: which of its ONNX files.
        provider: the execution provider.
        threads: CPU threads for one inference; 0 takes one per core.

    Raises:
        BundleError: the bundle has no such file, or one that cannot be opened.
        BackendUnavailableError: the provider is not available on this machine.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        *,
        precision: str = "fp32",
        provider: OnnxRuntimeProvider = "cpu",
        threads: int = 0,
    ) -> None:
        self._manifest = manifest
        artefact = onnx_artefact(manifest, precision)
        file = bundle / artefact.file
        self._run_options = onnxruntime.RunOptions()
        self._run_options.only_execute_path_to_fetches = True  # else every output is computed
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that spin while they wait would take the processor from decoding and blending.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = onnxruntime.InferenceSession(
                file, options, providers=_providers(provider)
            )
        except OPEN_ERRORS as error:
            raise BundleError(
                f"{file} cannot be opened by ONNX Runtime {onnxruntime.__version__}: "
                f"{first_line(error)}. Export the checkpoint again."
            ) from error
        self.providers: list[str] = self._session.get_providers()
        """The execution providers in use, the preferred one first."""
        if provider == "cuda" and self.providers[0] != _CUDA:
            raise BackendUnavailableError(
                f"ONNX Runtime fell back from CUDA to {self.providers[0]}; its log says why. Check "
                "the GPU's driver and libraries, or choose FOCALPATH_PROVIDER=cpu."
            )

    def infer(self, images: NDArray[np.uint8], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """See `Backend.infer`."""
        return in_batches(self._infer_batch, images, outputs, self._manifest)

    def _infer_batch(
        self, images: NDArray[np.uint8], outputs: Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        try:
            answers = self._session.run(list(outputs), {"image": images}, self._run_options)
        except RUN_ERRORS as error:
            raise BackendUnavailableError(
                f"ONNX Runtime failed on a batch of {len(images)} tiles: {first_line(error)}. "
                "Check this machine's free memory, or set a smaller FOCALPATH_CONCURRENCY."
            ) from error
        return dict(zip(outputs, answers, strict=True))

    def is_ready(self) -> bool:
        """True: an open session answers."""
        return True

    def close(self) -> None:
        """Nothing to do: the session is freed with this object."""


def has_cuda() -> bool:
    """Whether the installed ONNX Runtime was built for CUDA, not whether there is a GPU."""
    return _CUDA in onnxruntime.get_available_providers()


def _providers(provider: OnnxRuntimeProvider) -> list[str]:
    available = onnxruntime.get_available_providers()
    if provider == "cuda" and _CUDA not in available:
        raise BackendUnavailableError(
            f"ONNX Runtime {onnxruntime.__version__} has no CUDA, only {', '.join(available)}. "
            "Install onnxruntime-gpu in place of onnxruntime, or choose another provider with "
            "FOCALPATH_PROVIDER."
        )
    if provider == "cpu":
        return [_CPU]
    onnxruntime.preload_dlls()  # finds CUDA and cuDNN where pip installed them
    return [_CUDA, _CPU]
