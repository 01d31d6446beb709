"""Clients with one `segment()`: over HTTP to the service, over gRPC to a Triton server."""

import io
import zipfile
from types import TracebackType
from typing import Self

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from serve.backends import TritonBackend
from serve.errors import (
    BackendUnavailableError,
    FocalPathError,
    ImageError,
    ImageTooLargeError,
)
from serve.manifest import Manifest
from serve.outputs import Summary
from serve.segmenter import Segmentation, Segmenter, check_image


class HttpClient:
    """Segments images through the HTTP service.

    Args:
        url: where the service listens, such as http://127.0.0.1:3000.
        timeout_s: seconds to wait for one answer.
    """

    def __init__(self, url: str, *, timeout_s: float = 300.0) -> None:
        self._url = url.rstrip("/")
        if not self._url.startswith(("http://", "https://")):
            raise BackendUnavailableError(
                f"{url!r} is no address of the service; expected http://host:port."
            )
        self._client = httpx.Client(timeout=timeout_s)
        self._manifest: Manifest | None = None

    @property
    def manifest(self) -> Manifest:
        """The model behind the service, asked for once.

        Raises:
            BackendUnavailableError: the service does not answer, or not as FocalPath's does.
        """
        if self._manifest is None:
            answer = self._request("GET", "/model")
            try:
                self._manifest = Manifest.model_validate_json(answer)
            except ValidationError as error:
                raise BackendUnavailableError(
                    f"{self._url}/model does not answer with a manifest that this version of "
                    "FocalPath reads. Check the address, and use the same version on both sides."
                ) from error
        return self._manifest

    def segment(self, image: NDArray[np.uint8]) -> Segmentation:
        """Segment an image of any size up to the service's limit.

        Args:
            image: (H, W, 3) uint8, RGB in [0, 255].

        Raises:
            ImageError: the service refuses the image.
            BackendUnavailableError: the service or its backend does not answer.
        """
        check_image(image)
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
        answer = self._request("POST", "/arrays", buffer.getvalue())
        try:
            with np.load(io.BytesIO(answer), allow_pickle=False) as arrays:
                return Segmentation(
                    labels=arrays["labels"],
                    confidence=arrays["confidence"],
                    summary=Summary.model_validate_json(arrays["summary"].tobytes()),
                )
        except (ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
            raise BackendUnavailableError(
                f"{self._url}/arrays does not answer with the arrays of FocalPath's service: "
                f"{error}. Check the address, and use the same version on both sides."
            ) from error

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _request(self, method: str, path: str, png: bytes | None = None) -> bytes:
        files = None if png is None else {"image": ("image.png", png, "image/png")}
        try:
            response = self._client.request(method, self._url + path, files=files)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise BackendUnavailableError(
                f"no service at {self._url}: {error}. Start one with `python -m serve http`, or "
                "correct the address."
            ) from error
        if response.is_success:
            return response.content
        raise _as_error(response, self._url)


class TritonClient(Segmenter):
    """Segments images on a Triton server over gRPC, tiling on this side.

    Args:
        url: host:port of Triton's gRPC endpoint.
        manifest: of the bundle that Triton's model repository was filled from.
        timeout_s: seconds to wait for one answer.

    Raises:
        BackendUnavailableError: Triton is not reachable or serves something else.
    """

    def __init__(self, url: str, manifest: Manifest, *, timeout_s: float = 30.0) -> None:
        super().__init__(TritonBackend(url, manifest, timeout_s=timeout_s), manifest)


def _as_error(response: httpx.Response, url: str) -> FocalPathError:
    try:
        message = str(response.json()["error"])
    except (ValueError, LookupError, TypeError):
        message = f"{url} answers {response.status_code}, which FocalPath's service does not."
    match response.status_code:
        case 400:
            return ImageError(message)
        case 413:
            return ImageTooLargeError(message)
        case _:
            return BackendUnavailableError(message)
