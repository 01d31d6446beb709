"""ONNX Runtime as a backend: one of the bundle's graphs on this machine's CPU or GPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from serve.contract import cuda
from serve.contract.errors import BackendUnavailableError, BundleError
from serve.contract.manifest import Manifest
from serve.inference.backend import check_interface, first_line, in_batches, onnx_artefact

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

OnnxRuntimeProvider = Literal["cpu", "cuda"]

_ADVICE: dict[OnnxRuntimeProvider, str] = {
    "cpu": "Check this machine's free memory, or set a smaller FOCALPATH_CONCURRENCY.",
    "cuda": "Check what else uses the GPU, or set a smaller FOCALPATH_MAX_BATCH_SIZE.",
}
"""What to do when a batch fails."""


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
        self._provider = provider
        try:
            self._session: Any = (
                cuda.open_session(file, options)
                if provider == "cuda"
                else onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            )
        except OPEN_ERRORS as error:
            raise BundleError(
                f"{file} cannot be opened by ONNX Runtime {onnxruntime.__version__}: "
                f"{first_line(error)}. Export the checkpoint again."
            ) from error
        graph = [*self._session.get_inputs(), *self._session.get_outputs()]
        found = [(node.name, node.type, tuple(node.shape)) for node in graph]
        check_interface(file, manifest, found)
        self.providers: list[str] = self._session.get_providers()
        """The execution providers in use, the preferred one first."""

    def infer(self, images: NDArray[np.uint8], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """See `Backend.infer`."""
        return in_batches(self._infer_batch, images, outputs, self._manifest)

    def _infer_batch(
        self, images: NDArray[np.uint8], outputs: Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        try:
            answers = self._session.run(list(outputs), {"image": images}, self._run_options)
        except RUN_ERRORS as error:
            reason_of = cuda.reason_of if self._provider == "cuda" else first_line
            raise BackendUnavailableError(
                f"ONNX Runtime failed on a batch of {len(images)} tiles: {reason_of(error)}. "
                f"{_ADVICE[self._provider]}"
            ) from error
        return dict(zip(outputs, answers, strict=True))

    def is_ready(self) -> bool:
        """True: an open session answers."""
        return True

    def close(self) -> None:
        """Free the session, and with it the GPU's memory."""
        self._session = None
