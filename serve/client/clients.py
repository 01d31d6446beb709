"""Clients with one `segment()`: over HTTP to the service, over gRPC to a Triton server.

`AsyncHttpClient` and `AsyncTritonClient` are the same to be awaited.
"""

import asyncio
import io
import time
import zipfile
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from serve.contract.errors import (
    BackendUnavailableError,
    FocalPathError,
    ImageError,
    ImageTooLargeError,
)
from serve.contract.manifest import Manifest
from serve.images.mpp import FROM_REQUEST, check_mpp
from serve.inference.batching import TilePool
from serve.inference.segmenter import MAX_PIXELS, Closing, Segmentation, TileSegmenter, check_image
from serve.inference.summary import MppSource, Summary
from serve.inference.tiling import LowResProbabilities
from serve.inference.triton import TritonBackend
from serve.settings import SharedMemory

_FIRST_PAUSE_S = 1.0
"""Before the second attempt where the service does not say; twice as long before each further."""
_MOST_UNAVAILABLE = 4
"""Answers 502 and 503, and lost connections, after which a client gives up: the model may not come
back for long."""


class HttpClient(Closing):
    """Segments images through the HTTP service.

    Args:
        url: where the service listens, such as http://127.0.0.1:3000.
        timeout_s: seconds to wait for one answer.
        api_key: sent with every request.
        patience_s: seconds for which a service that is busy (429), without its model (503) or
            restarting (502 of a proxy, a lost connection) is asked again, as it says in Retry-After
            or after growing pauses.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 300.0,
        api_key: str | None = None,
        patience_s: float = 120.0,
    ) -> None:
        self._url = _checked_url(url)
        self._patience_s = patience_s
        self._has_answered = False
        self._client = httpx.Client(timeout=timeout_s, headers=_headers(api_key))
        self._manifest: Manifest | None = None

    @property
    def manifest(self) -> Manifest:
        """The model behind the service, asked for once.

        Raises:
            BackendUnavailableError: the service does not answer, or not as FocalPath's does.
        """
        if self._manifest is None:
            self._manifest = _parse_manifest(self._request("GET", "/model"), self._url)
        return self._manifest

    def segment(
        self,
        image: NDArray[np.uint8] | bytes | Path,
        *,
        mpp: float | None = None,
        mpp_source: MppSource = FROM_REQUEST,
        with_probabilities: bool = False,
    ) -> Segmentation:
        """Segment an image of any size up to the service's limit.

        Args:
            image: (H, W, 3) uint8, RGB in [0, 255], which is sent as a PNG; or an image file, as
                its path or its bytes, which is sent as it is. The service reads a file's own um
                per pixel.
            mpp: um per pixel of the image; None takes the file's, or else the model's.
            mpp_source: who says so, where `mpp` is given.
            with_probabilities: also return the probabilities of all classes.

        Raises:
            ImageError: the file cannot be read, or the service refuses the image.
            OptionError: `mpp` is absurd.
            BackendUnavailableError: the service or its backend does not answer.
        """
        request = _segment_request(image, mpp, with_probabilities)
        return _parse_arrays(self._request("POST", "/arrays", **request), self._url, mpp_source)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _request(self, method: str, path: str, **options: Any) -> bytes:
        patience = _Patience(self._patience_s, has_answered=self._has_answered)
        while True:
            try:
                response = self._client.request(method, self._url + path, **options)
            except (httpx.TransportError, httpx.InvalidURL) as error:
                pause_s = patience.after_loss_s(error)
                if pause_s is None:
                    raise _not_there(self._url, error) from error
            else:
                self._has_answered = True
                pause_s = patience.pause_s(response)
                if pause_s is None:
                    return _content(response, self._url)
            time.sleep(pause_s)


class _AsyncClosing(ABC):
    """`Closing`, to be awaited."""

    @abstractmethod
    async def close(self) -> None:
        """Free what is held; not used after."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


class AsyncHttpClient(_AsyncClosing):
    """`HttpClient`, to be awaited.

    Args:
        url: where the service listens, such as http://127.0.0.1:3000.
        timeout_s: seconds to wait for one answer.
        api_key: sent with every request.
        patience_s: see `HttpClient`.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 300.0,
        api_key: str | None = None,
        patience_s: float = 120.0,
    ) -> None:
        self._url = _checked_url(url)
        self._patience_s = patience_s
        self._has_answered = False
        self._client = httpx.AsyncClient(timeout=timeout_s, headers=_headers(api_key))

    async def manifest(self) -> Manifest:
        """The model behind the service; see `HttpClient.manifest`."""
        return _parse_manifest(await self._request("GET", "/model"), self._url)

    async def segment(
        self,
        image: NDArray[np.uint8] | bytes | Path,
        *,
        mpp: float | None = None,
        mpp_source: MppSource = FROM_REQUEST,
        with_probabilities: bool = False,
    ) -> Segmentation:
        """Segment an image of any size; see `HttpClient.segment`."""
        request = await asyncio.to_thread(_segment_request, image, mpp, with_probabilities)
        content = await self._request("POST", "/arrays", **request)
        return await asyncio.to_thread(_parse_arrays, content, self._url, mpp_source)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _request(self, method: str, path: str, **options: Any) -> bytes:
        patience = _Patience(self._patience_s, has_answered=self._has_answered)
        while True:
            try:
                response = await self._client.request(method, self._url + path, **options)
            except (httpx.TransportError, httpx.InvalidURL) as error:
                pause_s = patience.after_loss_s(error)
                if pause_s is None:
                    raise _not_there(self._url, error) from error
            else:
                self._has_answered = True
                pause_s = patience.pause_s(response)
                if pause_s is None:
                    return _content(response, self._url)
            await asyncio.sleep(pause_s)


class TritonClient(TileSegmenter):
    """Segments images on a Triton server over gRPC, tiling on this side.

    Args:
        url: host:port of Triton's gRPC endpoint.
        manifest: of the bundle that Triton's model repository was filled from.
        timeout_s: seconds to wait for one answer.
        shared_memory: whether to pass tensors through it; auto where Triton is on loopback.
        max_pixels: most pixels of an image once it is at the model's um per pixel.

    Raises:
        BackendUnavailableError: Triton is not reachable or serves something else.
    """

    def __init__(
        self,
        url: str,
        manifest: Manifest,
        *,
        timeout_s: float = 30.0,
        shared_memory: SharedMemory = "auto",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        backend = TritonBackend(url, manifest, timeout_s=timeout_s, shared_memory=shared_memory)
        pool = TilePool(backend, max_tiles=2 * manifest.max_batch_size)
        super().__init__(pool, manifest, max_pixels=max_pixels)


class AsyncTritonClient(_AsyncClosing):
    """`TritonClient`, to be awaited: it works in threads, since tiling and blending compute.

    Args:
        url: host:port of Triton's gRPC endpoint.
        manifest: of the bundle that Triton's model repository was filled from.
        timeout_s: seconds to wait for one answer.
        shared_memory: whether to pass tensors through it; auto where Triton is on loopback.
        max_pixels: most pixels of an image once it is at the model's um per pixel.

    Raises:
        BackendUnavailableError: Triton is not reachable or serves something else.
    """

    def __init__(
        self,
        url: str,
        manifest: Manifest,
        *,
        timeout_s: float = 30.0,
        shared_memory: SharedMemory = "auto",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._client = TritonClient(
            url, manifest, timeout_s=timeout_s, shared_memory=shared_memory, max_pixels=max_pixels
        )

    async def manifest(self) -> Manifest:
        """The manifest that this client was given."""
        return self._client.manifest

    async def segment(
        self,
        image: NDArray[np.uint8],
        *,
        mpp: float | None = None,
        mpp_source: MppSource = FROM_REQUEST,
        with_probabilities: bool = False,
    ) -> Segmentation:
        """Segment an image of any size; see `TileSegmenter.segment`."""
        return await asyncio.to_thread(
            self._client.segment,
            image,
            mpp=mpp,
            mpp_source=mpp_source,
            with_probabilities=with_probabilities,
        )

    async def close(self) -> None:
        """Close the channel."""
        await asyncio.to_thread(self._client.close)


class _Patience:
    """When a request is sent again to a service that cannot answer it now.

    A request changes nothing at the service, so it can be sent as often as one likes.
    """

    def __init__(self, patience_s: float, *, has_answered: bool) -> None:
        self._has_answered = has_answered
        self._deadline = time.monotonic() + patience_s
        self._pause_s = _FIRST_PAUSE_S
        self._num_unavailable = 0

    def pause_s(self, response: httpx.Response) -> float | None:
        """Seconds to wait before the next attempt; None where there is to be none."""
        self._has_answered = True
        if response.status_code not in (429, 502, 503):
            return None
        self._num_unavailable += response.status_code != 429
        return self._next_s(_retry_after_s(response))

    def after_loss_s(self, error: Exception) -> float | None:
        """The same after a request without an answer.

        A worker that is lost takes its connections with it, and another answers soon. A service
        that never answered is rather not there, and one that is too slow stays so.
        """
        was_lost = isinstance(error, (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError))
        is_away = isinstance(error, httpx.ConnectError) and self._has_answered
        if not (was_lost or is_away):
            return None
        self._has_answered = True
        self._num_unavailable += 1
        return self._next_s(0.0)

    def _next_s(self, asked_s: float) -> float | None:
        pause_s = asked_s or self._pause_s
        self._pause_s *= 2
        is_over = time.monotonic() + pause_s > self._deadline
        return None if is_over or self._num_unavailable >= _MOST_UNAVAILABLE else pause_s


def _retry_after_s(response: httpx.Response) -> float:
    """What the service says in seconds; 0 where it says nothing, or a date."""
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isdecimal() else 0.0


def _checked_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise BackendUnavailableError(
            f"{url!r} is no address of the service; expected http://host:port."
        )
    return url.rstrip("/")


def _headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"X-API-Key": api_key}


def _upload(image: NDArray[np.uint8] | bytes | Path) -> tuple[str, bytes, str]:
    """An image as a file of a form: a file's own bytes, or an array as a PNG."""
    if isinstance(image, bytes):
        return "image", image, "application/octet-stream"
    if isinstance(image, Path):
        try:
            return image.name, image.read_bytes(), "application/octet-stream"
        except OSError as error:
            raise ImageError(
                f"{image} cannot be read: {error.strerror}. Check the path."
            ) from error
    check_image(image)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return "image.png", buffer.getvalue(), "image/png"


def _segment_request(
    image: NDArray[np.uint8] | bytes | Path, mpp: float | None, with_probabilities: bool
) -> dict[str, Any]:
    """What `POST /arrays` is sent."""
    options: dict[str, str | float] = {}
    if mpp is not None:
        check_mpp(mpp)
        options["mpp"] = mpp
    if with_probabilities:
        options["probabilities"] = "true"
    return {
        "files": {"image": _upload(image)},
        "params": options,
    }


def _parse_manifest(content: bytes, url: str) -> Manifest:
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise BackendUnavailableError(
            f"{url}/model does not answer with a manifest that this version of FocalPath reads. "
            "Check the address, and use the same version on both sides."
        ) from error


def _parse_arrays(content: bytes, url: str, mpp_source: MppSource) -> Segmentation:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            summary = Summary.model_validate_json(arrays["summary"].tobytes())
            low_res = None
            if "probabilities" in arrays:
                low_res = LowResProbabilities(
                    arrays["probabilities"],
                    tuple(arrays["origin_px"].tolist()),
                    tuple(arrays["stride_px"].tolist()),
                )
            labels, confidence = arrays["labels"], arrays["confidence"]
    except (ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
        raise BackendUnavailableError(
            f"{url}/arrays does not answer with the arrays of FocalPath's service: {error}. "
            "Check the address, and use the same version on both sides."
        ) from error
    if summary.image.mpp_source == FROM_REQUEST:  # the caller may have it from elsewhere
        image = summary.image.model_copy(update={"mpp_source": mpp_source})
        summary = summary.model_copy(update={"image": image})
    return Segmentation(labels, confidence, summary, low_res)


def _not_there(url: str, error: Exception) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"no service at {url}: {error}. Start one with `python -m serve http`, or correct the "
        "address."
    )


def _content(response: httpx.Response, url: str) -> bytes:
    if response.is_success:
        return response.content
    raise _as_error(response, url)


_PROXY_HINTS = {
    413: "A proxy before the service refuses uploads of this size: raise its limit (nginx: "
    "client_max_body_size), or send a smaller image.",
    502: "A proxy before the service cannot reach it. Try again in a moment.",
    504: "A proxy before the service stopped waiting for it: let it wait longer (nginx: "
    "proxy_read_timeout), or send a smaller image.",
}
"""For statuses whose answer is not the service's own."""


def _as_error(response: httpx.Response, url: str) -> FocalPathError:
    try:
        message = str(response.json()["error"])
    except (ValueError, LookupError, TypeError):
        message = _PROXY_HINTS.get(
            response.status_code, "FocalPath's service does not answer so. Check the address."
        )
        message = f"{url} answers {response.status_code} without a message. {message}"
    match response.status_code:
        case 400:
            return ImageError(message)
        case 413:
            return ImageTooLargeError(message)
        case _:
            return BackendUnavailableError(message)
