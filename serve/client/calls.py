"""The calls to the HTTP service: what is sent, and how the answer is read.

`HttpClient` and `AsyncHttpClient` differ only in how they send a call.
"""

import io
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

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
from serve.images.mpp import FROM_REQUEST, MppSource, check_mpp
from serve.inference.segmenter import Segmentation, check_image
from serve.inference.summary import Summary
from serve.inference.tiling import LowResProbabilities

T = TypeVar("T")
_VERSIONS = "Check the address, and use the same version on both sides."
_PROXY_HINTS = {
    413: "A proxy before the service refuses uploads of this size: raise its limit (nginx: "
    "client_max_body_size), or send a smaller image.",
    502: "A proxy before the service cannot reach it. Try again in a moment.",
    504: "A proxy before the service stopped waiting for it: let it wait longer (nginx: "
    "proxy_read_timeout), or send a smaller image.",
}
"""Advice by status, for error answers that do not come from the service itself."""


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request, and how its answer is read."""

    method: str
    path: str
    read: Callable[[bytes, str], T]
    """Makes the result of the answer's content and the service's URL."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments for `httpx.Client.request`."""

    def result(self, response: httpx.Response, url: str) -> T:
        """Read the answer of the service at `url`.

        Raises:
            ImageError: the service refuses the image.
            BackendUnavailableError: the service cannot answer, or does not answer as FocalPath's.
        """
        if not response.is_success:
            raise _error_of(response, url)
        return self.read(response.content, url)


def manifest_call() -> Call[Manifest]:
    """Ask for the manifest of the model."""
    return Call("GET", "/model", _read_manifest)


def segment_call(
    image: NDArray[np.uint8] | bytes | Path,
    *,
    mpp: float | None,
    mpp_source: MppSource,
    with_probabilities: bool,
) -> Call[Segmentation]:
    """Ask for the segmentation of an image; see `HttpClient.segment`.

    Raises:
        ImageError: the array has another shape or dtype, or the file cannot be read.
        OptionError: `mpp` is out of range.
    """
    query: dict[str, str | float] = {}
    if mpp is not None:
        check_mpp(mpp)
        query["mpp"] = mpp
    if with_probabilities:
        query["probabilities"] = "true"
    options = {"files": {"image": _upload_of(image)}, "params": query}
    return Call("POST", "/arrays", partial(_read_arrays, mpp_source=mpp_source), options)


def _upload_of(image: NDArray[np.uint8] | bytes | Path) -> tuple[str, bytes, str]:
    """Name, content and media type: a file's own bytes, or an array as a PNG."""
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


def _read_manifest(content: bytes, url: str) -> Manifest:
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise BackendUnavailableError(
            f"{url}/model does not answer with a manifest that this version of FocalPath can read. "
            f"{_VERSIONS}"
        ) from error


def _read_arrays(content: bytes, url: str, *, mpp_source: MppSource) -> Segmentation:
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
            f"{_VERSIONS}"
        ) from error
    if summary.image.mpp_source == FROM_REQUEST:  # the caller knows where it comes from
        image = summary.image.model_copy(update={"mpp_source": mpp_source})
        summary = summary.model_copy(update={"image": image})
    return Segmentation(labels, confidence, summary, low_res)


def _error_of(response: httpx.Response, url: str) -> FocalPathError:
    """The error that an answer tells, with the service's own code if it has one."""
    status = response.status_code
    code = None
    try:
        fields = response.json()
        message = str(fields["error"])
        code = fields.get("code")
    except (ValueError, LookupError, TypeError):
        hint = _PROXY_HINTS.get(
            status, "FocalPath's service does not answer so. Check the address."
        )
        message = f"{url} answers {status} without a message. {hint}"
    match status:
        case 400:
            return ImageError(message, code=code)
        case 413:
            return ImageTooLargeError(message, code=code)
        case _:
            return BackendUnavailableError(message, code=code)
