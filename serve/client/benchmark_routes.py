"""The routes to a segmentation that the benchmark compares, and what it needs to open them."""

import http.client
import io
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tritonclient import http as triton_http
from tritonclient.utils import InferenceServerException

from serve.contract.errors import BackendUnavailableError
from serve.contract.manifest import Manifest
from serve.images.tiles import cut_tiles
from serve.inference.backend import Backend
from serve.inference.batching import TileRunner
from serve.settings import ENVIRONMENT_PREFIX, InferenceSettings, ServeSettings

_START_TIMEOUT_S = 300.0
_POLL_S = 0.1

Ask = Callable[[], object]
"""Sends one request; raises if it is not answered."""


@dataclass(frozen=True)
class Route:
    """One way to get a segmentation."""

    name: str
    connect: Callable[[], AbstractContextManager[Ask]]
    """Each client enters it once, and then calls the result for every request."""


class TritonHttpBackend:
    """A Triton server over HTTP. Only the benchmark uses it, since gRPC is faster.

    Args:
        url: host:port of Triton's HTTP endpoint.
        manifest: of the model that it serves.
    """

    def __init__(self, url: str, manifest: Manifest) -> None:
        self._manifest = manifest
        self._url = url
        self._local = threading.local()  # gevent's connections stay with the thread that made them

    @property
    def _client(self) -> Any:
        if not hasattr(self._local, "client"):
            self._local.client = triton_http.InferenceServerClient(self._url)
        return self._local.client

    def infer(self, images: NDArray[np.uint8], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """See `Backend.infer`."""
        tensor = triton_http.InferInput("image", list(images.shape), "UINT8")
        tensor.set_data_from_numpy(np.ascontiguousarray(images))
        wanted = [triton_http.InferRequestedOutput(name) for name in outputs]
        try:
            result = self._client.infer(self._manifest.name, [tensor], outputs=wanted)
        except (InferenceServerException, OSError) as error:
            raise BackendUnavailableError(
                f"Triton at {self._url} did not answer over HTTP: {error}. Check --triton-http-url."
            ) from error
        return {name: result.as_numpy(name) for name in outputs}

    def check(self) -> None:
        """Raise BackendUnavailableError unless the server has the model loaded."""
        try:
            is_ready = self._client.is_model_ready(self._manifest.name)
        except (InferenceServerException, OSError) as error:
            raise BackendUnavailableError(
                f"Triton does not answer over HTTP at {self._url}: {error}."
            ) from error
        if not is_ready:
            raise BackendUnavailableError(f"Triton at {self._url} has no {self._manifest.name}.")

    def is_ready(self) -> bool:
        """See `Backend.is_ready`."""
        return bool(self._client.is_model_ready(self._manifest.name))

    def close(self) -> None:
        """See `Backend.close`; each connection closes when its thread ends."""


def tiles_of(backend: Backend, image: NDArray[np.uint8], manifest: Manifest) -> Ask:
    """The model alone, on all tiles of an image at once, in full batches."""
    tiles = cut_tiles(image, manifest.tile_size_px)
    return lambda: backend.infer(tiles, _outputs_for(len(tiles)))


def spread_tiles_of(runner: TileRunner, image: NDArray[np.uint8], manifest: Manifest) -> Ask:
    """The model alone, on all tiles of an image, as a runner spreads them over its batches."""
    tiles = cut_tiles(image, manifest.tile_size_px)
    outputs = _outputs_for(len(tiles))
    return lambda: [one.result() for one in [runner.submit(tile, outputs) for tile in tiles]]


def _outputs_for(num_tiles: int) -> tuple[str, ...]:
    """What an image of so many tiles needs of each."""
    if num_tiles == 1:
        return ("labels", "confidence", "iou_scores")
    return ("low_res_probabilities", "iou_scores")


def one_tile_of(backend: Backend, image: NDArray[np.uint8], manifest: Manifest) -> Ask:
    """One tile and all outputs, as perf_analyzer asks for."""
    tile = cut_tiles(image, manifest.tile_size_px)[:1]
    outputs = [output.name for output in manifest.outputs]
    return lambda: backend.infer(tile, outputs)


def service_route(name: str, url: str, path: str, png: bytes, api_key: str | None) -> Route:
    """An upload to the HTTP service; each client keeps one connection, as `HttpClient` does."""
    form = httpx.Request("POST", url, files={"image": ("image.png", png, "image/png")})
    body, headers = form.read(), {"Content-Type": form.headers["Content-Type"]}
    if api_key is not None:
        headers["X-API-Key"] = api_key

    @contextmanager
    def connect() -> Iterator[Ask]:
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=600)

        def post() -> http.client.HTTPResponse:
            connection.request("POST", parts.path.rstrip("/") + path, body, headers)
            return connection.getresponse()

        def ask() -> bytes:
            try:
                response = post()
            except ConnectionError:  # the service hangs up on who waits for the other clients
                connection.close()
                response = post()
            content = response.read()
            if response.status != 200:
                raise BackendUnavailableError(
                    f"{url}{path} answered {response.status}: {content[:200]!r}. The benchmark "
                    "needs every request answered: check --clients against the service's "
                    "max_waiting, and its log."
                )
            return content

        with closing(connection):
            yield ask

    return Route(name, connect)


@contextmanager
def own_service(settings: InferenceSettings, most_clients: int) -> Iterator[str]:
    """Start the HTTP service with these settings in another process; yields its address.

    The service reads its other settings from the environment.
    """
    waiting = max(ServeSettings.from_environment().max_waiting, 2 * most_clients)
    variables = settings.to_environment() | {
        f"{ENVIRONMENT_PREFIX}MAX_WAITING": str(waiting),
        f"{ENVIRONMENT_PREFIX}MAX_WAITING_TILES": str(10**7),  # nothing is refused
    }
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve", "http", "--host", "127.0.0.1", "--port", str(port)],
            env=os.environ | variables,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_until_ready(process, port, lambda: _tail(log))
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=60)


def _tail(log: Any) -> str:
    log.seek(0)
    return str(log.read()[-2000:].decode(errors="replace"))


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Callable[[], str]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=30, trust_env=False).is_success:
                return
        time.sleep(_POLL_S)
    raise BackendUnavailableError(f"the service for the benchmark did not start:\n{log()}")


def png_of(image: NDArray[np.uint8]) -> bytes:
    """Encode an image as a PNG, with Pillow's defaults."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def tissue_image(size_px: int) -> NDArray[np.uint8]:
    """Draw a (size, size, 3) uint8 RGB image that compresses as a stained section does (about 5:3).

    It has smooth patches in the colours of haematoxylin and eosin, with the noise of a camera.
    """
    rng = np.random.default_rng(0)
    coarse = rng.random((max(size_px // 24, 2),) * 2)
    patches = Image.fromarray(coarse.astype(np.float32)).resize((size_px, size_px))
    share = np.asarray(patches)[:, :, None]
    stains = np.array([[236, 200, 220], [120, 80, 160]], np.float32)
    colours = stains[0] * (1 - share) + stains[1] * share
    grain = rng.normal(0, 6, (size_px, size_px, 3))
    return np.asarray((colours + grain).clip(0, 255), np.uint8)


def triton_http_of(url: str) -> str:
    """Triton's default HTTP address for a gRPC address: the same host, one port lower."""
    host, _, port = re.sub(r"^grpc://", "", url).rpartition(":")
    return f"{host}:{int(port) - 1}"
