"""Runs the model on a Triton server, over gRPC (KServe v2)."""

import ipaddress
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from opentelemetry import propagate
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from serve.contract.errors import (
    BackendUnavailableError,
    BackendUnreachableError,
    ModelChangedError,
)
from serve.contract.manifest import Manifest, TensorSpec
from serve.inference.backend import first_line, in_batches
from serve.inference.triton_shared_memory import SharedTensors, is_about_shared_memory
from serve.settings import InferenceSettings, SharedMemory

_CHECK_TIMEOUT_S = 5.0
"""Seconds to wait for Triton to say whether it is ready and what it serves."""


class TritonBackend:
    """Runs the model on a Triton server over gRPC; many threads may use it at once.

    Args:
        url: host:port of Triton's gRPC endpoint.
        manifest: of the model that Triton must serve.
        timeout_s: seconds to wait for one answer.
        shared_memory: whether to pass tensors through it; see `InferenceSettings`.

    Raises:
        BackendUnavailableError: Triton is not reachable, does not serve the model, or serves
            one with another interface than the manifest's.
    """

    def __init__(
        self,
        url: str,
        manifest: Manifest,
        *,
        timeout_s: float = 30.0,
        shared_memory: SharedMemory = "auto",
    ) -> None:
        self._url = _host_and_port(url)
        self._manifest = manifest
        self._timeout_s = timeout_s
        self._client = _client_of(self._url)
        is_used = shared_memory == "on" or (shared_memory == "auto" and _is_loopback(self._url))
        self._shared = SharedTensors(self._client, manifest) if is_used else None
        try:
            self._version = self._check_interface()
        except BackendUnavailableError:
            self.close()
            raise

    def infer(self, images: NDArray[np.uint8], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """See `Backend.infer`."""
        return in_batches(self._infer_batch, images, outputs, self._manifest)

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
        try:
            return {name: result.as_numpy(name) for name in outputs}
        except ValueError as error:  # fewer values than its shape has
            raise self._changed(first_line(error), "whole outputs") from error

    def _infer_shared(
        self, images: NDArray[np.uint8], outputs: Sequence[str]
    ) -> dict[str, NDArray[Any]] | None:
        """Infer through shared memory; None if it is off, or Triton does not know the region."""
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
        expected = _as_triton(self._manifest.outputs)
        for name in (output.name() for output in wanted):
            datatype, (_, *sides) = expected[name]
            shape = [tensor.shape()[0], *sides]
            output = result.get_output(name)
            # In shared memory, what is not written is the answer of another request.
            if output is None or (output.datatype, list(output.shape)) != (datatype, shape):
                told = "nothing" if output is None else f"{output.datatype} {list(output.shape)}"
                raise self._changed(f"{name} is {told}", f"{datatype} {shape}")
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
        """Compare Triton's model with the manifest; return Triton's version number of it."""
        try:
            metadata = self._client.get_model_metadata(
                self._manifest.name, client_timeout=self._timeout_s
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

    def _count_tiles(self) -> int | None:
        """How many tiles Triton has answered since it loaded the model; None if it does not say."""
        try:
            found = self._client.get_inference_statistics(
                self._manifest.name, self._version, client_timeout=_CHECK_TIMEOUT_S
            )
        except InferenceServerException:
            return None
        return sum(int(model.inference_count) for model in found.model_stats)

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
                return BackendUnreachableError(
                    f"Triton is not reachable at {self._url}; expected it to serve {name}. Start "
                    "it, or set its gRPC address with FOCALPATH_TRITON_URL."
                )
            case "StatusCode.DEADLINE_EXCEEDED":
                found = f"Triton at {self._url} did not answer within {self._timeout_s:g} s"
                todo = "Try again, or raise FOCALPATH_TRITON_TIMEOUT_S"
            case "StatusCode.INVALID_ARGUMENT":  # the interface was right when it was opened
                return self._changed(first_line(error.message()))
            case _:
                found = f"Triton at {self._url} refused {name}: {first_line(error.message())}"
                todo = f"Check that its model repository has {name} and its log"
        return BackendUnavailableError(f"{found}; expected it to serve {name}. {todo}.")


def load_on_triton(settings: InferenceSettings, manifest: Manifest) -> None:
    """Make Triton load the newest version of the model from its repository.

    Raises:
        BackendUnavailableError: Triton is not reachable, does not run with
            `--model-control-mode=explicit`, or cannot load the model.
    """
    with _client_of(_host_and_port(settings.triton_url)) as client:
        try:
            client.load_model(manifest.name, client_timeout=settings.triton_timeout_s)
        except InferenceServerException as error:
            raise BackendUnavailableError(
                f"Triton at {settings.triton_url} did not load {manifest.name}: "
                f"{first_line(error.message())}. Start it with --model-control-mode=explicit, and "
                "publish the bundle into its repository."
            ) from error


def version_on_triton(settings: InferenceSettings, manifest: Manifest) -> str | None:
    """The version number under which Triton serves the model; None if Triton does not answer."""
    with _client_of(_host_and_port(settings.triton_url)) as client:
        try:
            metadata = client.get_model_metadata(manifest.name, client_timeout=_CHECK_TIMEOUT_S)
        except InferenceServerException:
            return None
        return _newest(metadata.versions)


def _client_of(address: str) -> triton.InferenceServerClient:
    return triton.InferenceServerClient(
        address,
        channel_args=[
            ("grpc.max_send_message_length", triton.MAX_GRPC_MESSAGE_SIZE),
            ("grpc.max_receive_message_length", triton.MAX_GRPC_MESSAGE_SIZE),
            # By default gRPC waits up to two minutes before it tries a lost server again.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 2_000),
            ("grpc.enable_http_proxy", 0),
        ],
    )


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host_and_port(url: str) -> str:
    address = url.removeprefix("grpc://")
    host, _, port = address.rpartition(":")
    is_port = port.isascii() and port.isdigit() and 0 < int(port) <= 65_535
    is_host = bool(host) and (":" not in host or (host[0], host[-1]) == ("[", "]"))  # IPv6
    if not is_host or "/" in address or not is_port:
        raise BackendUnavailableError(
            f"{url!r} is not the address of Triton's gRPC endpoint; expected host:port, "
            "such as 127.0.0.1:8001 or [::1]:8001."
        )
    return address


def _newest(versions: Sequence[str]) -> str:
    return max(versions, key=int, default="")


def _tensors(described: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {t.name: (t.datatype, tuple(t.shape)) for t in described}


def _as_triton(specs: Sequence[TensorSpec]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {t.name: (np_to_triton_dtype(np.dtype(t.dtype).type), t.shape) for t in specs}
