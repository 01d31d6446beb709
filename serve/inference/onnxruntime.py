"""Where the model runs: one protocol, and the backend in this process.

`OnnxRuntimeBackend` runs the bundle's ONNX file here, `serve.inference.triton` asks a Triton
server. Both answer with the arrays of the manifest's interface.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from serve.contract.errors import BackendUnavailableError, BundleError
from serve.contract.manifest import Artefact, Manifest
from serve.contract.openvino import GraphPrecision, openvino_options
from serve.settings import Provider

_OPEN_ERRORS = (
    ort.EPFail,
    ort.Fail,
    ort.InvalidArgument,
    ort.InvalidGraph,
    ort.InvalidProtobuf,
    ort.NoSuchFile,
    ort.NotImplemented,
)
_RUN_ERRORS = (
    ort.EPFail,
    ort.EngineError,
    ort.Fail,
    ort.InvalidArgument,
    ort.NotImplemented,
    ort.RuntimeException,
)
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

InferBatch = Callable[[NDArray[np.uint8], Sequence[str]], dict[str, NDArray[Any]]]


class Backend(Protocol):
    """Runs the model on tiles."""

    def infer(self, images: NDArray[np.uint8], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Run the model.

        Args:
            images: (B, T, T, 3) uint8, RGB in [0, 255], any B from 1.
            outputs: names from the manifest's outputs; the others are not computed or sent.

        Returns:
            The named outputs, with the dtypes and shapes of `serve.contract.manifest.interface`.

        Raises:
            BackendUnavailableError: the backend does not answer.
        """
        ...

    def is_ready(self) -> bool:
        """Whether `infer` would answer now."""
        ...

    def close(self) -> None:
        """Free what the backend holds; it is not used after."""
        ...


class OnnxRuntimeBackend:
    """Runs a bundle's ONNX file in this process.

    Args:
        bundle: the bundle's folder.
        manifest: its manifest.
        precision: which of its ONNX files.
        provider: what computes; see `ModelSettings.provider`.
        threads: CPU threads for one inference; 0 takes one a core.

    Raises:
        BundleError: the bundle has no such file, or one that cannot be opened, or it did not pass
            the gate with this provider.
        BackendUnavailableError: the provider is not there.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        *,
        precision: str = "fp32",
        provider: Provider = "auto",
        threads: int = 0,
    ) -> None:
        self._manifest = manifest
        artefact = _onnx_artefact(manifest, precision)
        file = bundle / artefact.file
        self._run_options = onnxruntime.RunOptions()
        self._run_options.only_execute_path_to_fetches = True  # else every output is computed
        if provider == "openvino":
            options = openvino_options(_openvino_precision(artefact), threads)
            providers = None  # they are in the options
        else:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            # Idle, its threads would take the processor from who decodes and blends.
            options.add_session_config_entry("session.force_spinning_stop", "1")
            providers = _providers(provider)
        try:
            self._session = onnxruntime.InferenceSession(file, options, providers=providers)
        except _OPEN_ERRORS as error:
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
        except _RUN_ERRORS as error:
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


def check_precision(manifest: Manifest, precision: str, provider: Provider) -> None:
    """Raise BundleError unless the bundle has what `OnnxRuntimeBackend` would open."""
    artefact = _onnx_artefact(manifest, precision)
    if provider == "openvino":
        _openvino_precision(artefact)


def in_batches(
    infer_batch: InferBatch, images: NDArray[np.uint8], outputs: Sequence[str], manifest: Manifest
) -> dict[str, NDArray[Any]]:
    """Split what is over the model's largest batch, and join the answers."""
    side = manifest.tile_size_px
    assert images.dtype == np.uint8
    assert images.shape[1:] == (side, side, 3), images.shape
    size = manifest.max_batch_size
    answers = [
        infer_batch(images[start : start + size], outputs) for start in range(0, len(images), size)
    ]
    if len(answers) == 1:
        return answers[0]
    return {name: np.concatenate([answer[name] for answer in answers]) for name in outputs}


def _onnx_artefact(manifest: Manifest, precision: str) -> Artefact:
    found = {a.precision: a for a in manifest.artefacts if a.format == "onnx"}
    if precision not in found:
        raise BundleError(
            f"the bundle has no ONNX file in {precision}, only in {', '.join(found) or 'none'}. "
            "Choose one with FOCALPATH_PRECISION, or export again."
        )
    return found[precision]


def _openvino_precision(artefact: Artefact) -> GraphPrecision:
    if artefact.openvino is None or artefact.precision not in ("bf16", "fp32"):
        raise BundleError(
            f"OpenVINO may not run {artefact.file}: it has not passed the export's gate there. "
            "Export with --openvino, which tries fp32 and bf16 (parity_report.md says what passed) "
            "and set FOCALPATH_PRECISION; or choose another provider with FOCALPATH_PROVIDER."
        )
    return artefact.precision


def _providers(provider: Provider) -> list[str]:
    available = onnxruntime.get_available_providers()
    if provider == "cuda" and _CUDA not in available:
        raise BackendUnavailableError(
            f"ONNX Runtime {onnxruntime.__version__} has no CUDA, only {', '.join(available)}. "
            "Install onnxruntime-gpu in place of onnxruntime, or choose another provider with "
            "FOCALPATH_PROVIDER."
        )
    if provider == "cpu" or _CUDA not in available:
        return [_CPU]
    onnxruntime.preload_dlls()  # finds CUDA and cuDNN where pip installed them
    return [_CUDA, _CPU]


def first_line(error: object) -> str:
    """What an error says, without what follows and its full stop."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
