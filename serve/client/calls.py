"""The calls to the HTTP service: what is sent, and how the answer is read.

`HttpClient` and `AsyncHttpClient` differ only in how they send a call.
"""

import io
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
    ModelChangedError,
)
from serve.contract.manifest import Manifest
from serve.contract.npz import read_npz
from serve.contract.proxies import is_proxied
from serve.contract.refusal import first_problem
from serve.images.mpp import FROM_REQUEST, MppSource, check_mpp
from serve.inference.segmenter import Segmentation, check_image
from serve.inference.summary import Summary
from serve.inference.tiling import LowResProbabilities

T = TypeVar("T")
_VERSIONS = "Check the address, and use the same version on both sides."
_ZIP = b"PK"
_MOST_SAID = 200
"""Characters of another software's message that are told."""
_PROXY_HINTS = {
    413: "A proxy before the service refuses uploads of this size: raise its limit (nginx: "
    "client_max_body_size), or send a smaller image.",
    502: "A proxy before the service cannot reach it. Try again in a moment.",
    504: "A proxy before the service stopped waiting for it: let it wait longer (nginx: "
    "proxy_read_timeout), or send a smaller image.",
}
"""Advice by status, for error answers that do not come from the service itself."""


THROUGH_PROXY = (
    " The request went through the proxy that HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names; list the "
    "service's host in NO_PROXY if it is inside your network."
)


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
    size = image.shape[:2] if isinstance(image, np.ndarray) else None
    read = partial(_read_arrays, size=size, mpp_source=mpp_source)
    return Call("POST", "/arrays", read, options)


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


def _read_arrays(
    content: bytes, url: str, *, size: tuple[int, ...] | None, mpp_source: MppSource
) -> Segmentation:
    """Read the answer; `size` is the image's height and width, where they are known."""
    try:
        if not content.startswith(_ZIP):
            raise ValueError(f"it begins with {content[:40]!r}")
        arrays = read_npz(io.BytesIO(content))
        summary = Summary.model_validate_json(arrays["summary"].tobytes())
        low_res = None
        if "probabilities" in arrays:
            low_res = LowResProbabilities(
                arrays["probabilities"],
                tuple(arrays["origin_px"].tolist()),
                tuple(arrays["stride_px"].tolist()),
            )
        labels, confidence = arrays["labels"], arrays["confidence"]
        if size is not None and labels.shape != size:
            raise ValueError(f"labels are {labels.shape}, expected the image's {size}")
        _check_arrays(labels, confidence, low_res, summary)
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = first_problem(error) if isinstance(error, ValidationError) else error
        raise BackendUnavailableError(
            f"{url}/arrays does not answer with the arrays of FocalPath's service: {reason}. "
            f"{_VERSIONS}"
        ) from error
    if summary.image.mpp_source == FROM_REQUEST:  # the caller knows where it comes from
        image = summary.image.model_copy(update={"mpp_source": mpp_source})
        summary = summary.model_copy(update={"image": image})
    return Segmentation(labels, confidence, summary, low_res)


def _check_arrays(
    labels: NDArray[np.uint8],
    confidence: NDArray[np.uint8],
    low_res: LowResProbabilities | None,
    summary: Summary,
) -> None:
    """Raise ValueError for arrays that are not what their summary says."""
    size, num_classes = (summary.image.height_px, summary.image.width_px), len(summary.classes)
    for name, array in (("labels", labels), ("confidence", confidence)):
        if array.dtype != np.uint8 or array.shape != size:
            raise ValueError(f"{name} are {array.dtype} {array.shape}, expected uint8 {size}")
    if labels.size and not 1 <= labels.min() <= labels.max() <= num_classes:
        raise ValueError(f"labels go to {labels.max()}, expected 1 to {num_classes}")
    if low_res is None:
        return
    shape, places = low_res.probabilities.shape, (low_res.origin_px, low_res.stride_px)
    if low_res.probabilities.dtype != np.uint8 or len(shape) != 3 or shape[0] != num_classes:
        raise ValueError(f"probabilities are {shape}, expected uint8 of {num_classes} classes")
    if any(not isinstance(place, tuple) or len(place) != 2 for place in places):
        raise ValueError("origin_px and stride_px are not two numbers each")


def check_answer(found: Segmentation, size: tuple[int, ...], manifest: Manifest) -> None:
    """Check that an answer is of the image that was sent, and of the model that was asked.

    Args:
        found: the answer.
        size: height and width of the image, as it is read here.
        manifest: that the service told before.

    Raises:
        ModelChangedError: the service has another model now.
        BackendUnavailableError: the service has read another size.
    """
    model = found.summary.model
    if (model.name, model.version) != (manifest.name, manifest.version):
        raise ModelChangedError(
            f"the service answers with {model.name} {model.version}, and had {manifest.name} "
            f"{manifest.version} before. Repeat the command, so that all images get one model."
        )
    if found.labels.shape != size:
        raise BackendUnavailableError(
            f"the service has labelled {found.labels.shape[1]} x {found.labels.shape[0]} pixels, "
            f"the image has {size[1]} x {size[0]}. {_VERSIONS}"
        )


def _error_of(response: httpx.Response, url: str) -> FocalPathError:
    """The error that an answer tells, with the service's own code if it has one."""
    status, said = response.status_code, "without a message"
    code: str | None = None
    try:
        fields = response.json()
        message, code = fields["error"], fields.get("code")
        if not (isinstance(message, str) and message and isinstance(code, str)):
            said = f"{str(message)[:_MOST_SAID]!r} without a code"  # such as Triton's
            raise ValueError(f"no message of FocalPath: {fields}")
    except (ValueError, LookupError, TypeError):
        code = None
        hint = _PROXY_HINTS.get(
            status, "FocalPath's service does not answer so. Check the address."
        )
        hint += THROUGH_PROXY if is_proxied(url) else ""
        if response.has_redirect_location:
            hint = f"It sends callers to {response.headers['Location']}. {hint}"
        message = f"{url} answers {status} {said}. {hint}"
    match status:
        case 400:
            return ImageError(message, code=code)
        case 413:
            return ImageTooLargeError(message, code=code)
        case _:
            return BackendUnavailableError(message, code=code)
