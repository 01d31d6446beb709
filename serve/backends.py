"""Where the model runs: one protocol, two backends.

`OnnxRuntimeBackend` runs the bundle's ONNX file in this process, `TritonBackend` asks a Triton
server over gRPC (KServe v2). Both answer with the arrays of the manifest's interface.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort
from opentelemetry import propagate
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from serve.errors import BackendUnavailableError, BundleError, ModelChangedError
from serve.manifest import Artefact, Manifest, TensorSpec
from serve.openvino_provider import GraphPrecision, openvino_options
from serve.settings import Provider, ServeSettings
from serve.shared_memory import SharedTensors, is_about_shared_memory

_log = logging.getLogger(__name__)
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
_CHECK_TIMEOUT_S = 5.0
"""Seconds to wait for Triton to say whether it is ready and what it serves."""

InferBatch = Callable[[NDArray[np.uint8], Sequence[str]], dict[str, NDArray[Any]]]


class Backend(Protocol):
    """Runs the model on tiles."""

    def infer(self, images: NDArray[np.uint8], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Run the model.

        Args:
            images: (B, T, T, 3) uint8, RGB in [0, 255], any B from 1.
            outputs: names from the manifest's outputs; the others are not computed or sent.

        Returns:
            The named outputs, with the dtypes and shapes of `serve.manifest.interface`.

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
        provider: what computes; see `ServeSettings.provider`.
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
                f"{_first_line(error)}. Export the checkpoint again."
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
        return _in_batches(self._infer_batch, images, outputs, self._manifest)

    def _infer_batch(
        self, images: NDArray[np.uint8], outputs: Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        try:
            answers = self._session.run(list(outputs), {"image": images}, self._run_options)
        except _RUN_ERRORS as error:
            raise BackendUnavailableError(
                f"ONNX Runtime failed on a batch of {len(images)} tiles: {_first_line(error)}. "
                "Check this machine's free memory, or set a smaller FOCALPATH_CONCURRENCY."
            ) from error
        return dict(zip(outputs, answers, strict=True))

    def is_ready(self) -> bool:
        """True: an open session answers."""
        return True

    def close(self) -> None:
        """Nothing to do: the session is freed with this object."""


class TritonBackend:
    """Asks a Triton server over gRPC; one client serves many threads.

    Args:
        url: host:port of Triton's gRPC endpoint.
        manifest: of the model that it is to serve.
        timeout_s: seconds to wait for one answer.
        shared_memory: pass tensors through shared memory, where Triton is on this machine.

    Raises:
        BackendUnavailableError: Triton is not reachable, does not serve the model, or serves
            one with another interface than the manifest's.
    """

    def __init__(
        self, url: str, manifest: Manifest, *, timeout_s: float = 30.0, shared_memory: bool = False
    ) -> None:
        self._url = _host_and_port(url)
        self._manifest = manifest
        self._timeout_s = timeout_s
        self._client = triton.InferenceServerClient(
            self._url,
            channel_args=[
                ("grpc.max_send_message_length", triton.MAX_GRPC_MESSAGE_SIZE),
                ("grpc.max_receive_message_length", triton.MAX_GRPC_MESSAGE_SIZE),
                # By default gRPC waits up to two minutes before it tries a lost server again.
                ("grpc.initial_reconnect_backoff_ms", 200),
                ("grpc.max_reconnect_backoff_ms", 2_000),
                ("grpc.enable_http_proxy", 0),
            ],
        )
        self._shared = SharedTensors(self._client, manifest) if shared_memory else None
        try:
            self._version = self._check_interface()
        except BackendUnavailableError:
            self.close()
            raise

    def infer(self, images: NDArray[np.uint8], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """See `Backend.infer`."""
        return _in_batches(self._infer_batch, images, outputs, self._manifest)

    def _infer_batch(
        self, images: NDArray[np.uint8], outputs: Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        images = np.ascontiguousarray(images)
        answers = self._infer_shared(images, outputs)
        if answers is not None:
            return answers
        tensor = triton.InferInput("image", list(images.shape), "UINT8")
        tensor.set_data_from_numpy(images)
        try:
            result = self._ask(tensor, [triton.InferRequestedOutput(name) for name in outputs])
        except InferenceServerException as error:
            raise self._unavailable(error) from error
        return {name: result.as_numpy(name) for name in outputs}

    def _infer_shared(
        self, images: NDArray[np.uint8], outputs: Sequence[str]
    ) -> dict[str, NDArray[Any]] | None:
        """Through shared memory; None where it is not used or Triton does not know the place."""
        place = self._shared.take(len(images)) if self._shared is not None else None
        if self._shared is None or place is None:
            return None
        try:
            self._ask(place.write(images), place.requested(outputs))
            answers = place.read(outputs)
        except ModelChangedError:
            place.close()
            raise
        except InferenceServerException as error:
            place.close()
            if is_about_shared_memory(error):
                return None
            raise self._unavailable(error) from error
        self._shared.give_back(place)
        return answers

    def _ask(
        self, tensor: triton.InferInput, wanted: list[triton.InferRequestedOutput]
    ) -> triton.InferResult:
        trace_headers: dict[str, str] = {}
        propagate.inject(trace_headers)  # W3C traceparent, if the caller's work is traced
        result = self._client.infer(
            self._manifest.name,
            [tensor],
            outputs=wanted,
            client_timeout=self._timeout_s,
            headers=trace_headers,
        )
        if (found := result.get_response().model_version) != self._version:
            raise self._changed(f"version {found}")
        return result

    def is_ready(self) -> bool:
        """Whether Triton is up and has the model loaded."""
        try:
            return bool(
                self._client.is_model_ready(self._manifest.name, client_timeout=_CHECK_TIMEOUT_S)
            )
        except InferenceServerException:
            return False

    def close(self) -> None:
        """Close the channel."""
        if self._shared is not None:
            self._shared.close()
        self._client.close()

    def _check_interface(self) -> str:
        """Compare what Triton serves with the manifest; return Triton's number of its version."""
        try:
            metadata = self._client.get_model_metadata(
                self._manifest.name, client_timeout=min(self._timeout_s, _CHECK_TIMEOUT_S)
            )
        except InferenceServerException as error:
            raise self._unavailable(error) from error
        for found, expected in (
            (_tensors(metadata.inputs), _as_triton(self._manifest.inputs)),
            (_tensors(metadata.outputs), _as_triton(self._manifest.outputs)),
        ):
            if found != expected:
                raise self._changed(str(found), str(expected))
        return _newest(metadata.versions)

    def _changed(self, found: str, expected: str | None = None) -> ModelChangedError:
        expected = expected or f"version {self._version}, as when it was opened"
        return ModelChangedError(
            f"Triton at {self._url} serves another {self._manifest.name}: found {found}, the "
            f"bundle's manifest expects {expected}. Fill Triton's model repository from this "
            "bundle, and wait until Triton has loaded it."
        )

    def _unavailable(self, error: InferenceServerException) -> BackendUnavailableError:
        name = self._manifest.name
        match error.status():
            case "StatusCode.UNAVAILABLE":
                found = f"Triton is not reachable at {self._url}"
                todo = "Start it, or set its gRPC address with FOCALPATH_TRITON_URL"
            case "StatusCode.DEADLINE_EXCEEDED":
                found = f"Triton at {self._url} did not answer within {self._timeout_s:g} s"
                todo = "Try again, or raise FOCALPATH_TRITON_TIMEOUT_S"
            case "StatusCode.INVALID_ARGUMENT":  # the interface was right when it was opened
                return self._changed(_first_line(error.message()))
            case _:
                found = f"Triton at {self._url} refused {name}: {_first_line(error.message())}"
                todo = f"Check that its model repository has {name} and its log"
        return BackendUnavailableError(f"{found}; expected it to serve {name}. {todo}.")


def open_backend(settings: ServeSettings, manifest: Manifest) -> Backend:
    """Open the backend that the settings name.

    Raises:
        BundleError: the bundle has no file that ONNX Runtime can open.
        BackendUnavailableError: Triton is not reachable or serves something else, or ONNX Runtime
            lacks the provider.
    """
    if settings.backend == "triton":
        return TritonBackend(
            settings.triton_url,
            manifest,
            timeout_s=settings.triton_timeout_s,
            shared_memory=settings.triton_shared_memory,
        )
    backend = OnnxRuntimeBackend(
        settings.bundle,
        manifest,
        precision=settings.precision,
        provider=settings.provider,
        threads=settings.threads,
    )
    _log.info("%s %s runs on %s", manifest.name, manifest.version, backend.providers[0])
    return backend


def load_on_triton(settings: ServeSettings, manifest: Manifest) -> None:
    """Have Triton load the newest version of the model from its repository.

    Raises:
        BackendUnavailableError: Triton is not reachable, not explicit or cannot load it.
    """
    with triton.InferenceServerClient(_host_and_port(settings.triton_url)) as client:
        try:
            client.load_model(manifest.name, client_timeout=settings.triton_timeout_s)
        except InferenceServerException as error:
            raise BackendUnavailableError(
                f"Triton at {settings.triton_url} did not load {manifest.name}: "
                f"{_first_line(error.message())}. Start it with --model-control-mode=explicit, and "
                "publish the bundle into its repository."
            ) from error


def version_on_triton(settings: ServeSettings, manifest: Manifest) -> str | None:
    """Triton's own number of the version that it answers with; None if it cannot be had now."""
    with triton.InferenceServerClient(_host_and_port(settings.triton_url)) as client:
        try:
            metadata = client.get_model_metadata(manifest.name, client_timeout=_CHECK_TIMEOUT_S)
        except InferenceServerException:
            return None
        return _newest(metadata.versions)


def _in_batches(
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


def _host_and_port(url: str) -> str:
    address = url.removeprefix("grpc://")
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdigit():
        raise BackendUnavailableError(
            f"{url!r} is no address of Triton's gRPC endpoint; expected host:port, "
            "such as 127.0.0.1:8001."
        )
    return address


def _newest(versions: Sequence[str]) -> str:
    return max(versions, key=int, default="")


def _tensors(described: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {t.name: (t.datatype, tuple(t.shape)) for t in described}


def _as_triton(specs: Sequence[TensorSpec]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {t.name: (np_to_triton_dtype(np.dtype(t.dtype).type), t.shape) for t in specs}


def _first_line(error: object) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
