"""Clients of the HTTP service: `HttpClient`, and `AsyncHttpClient` to await."""

import asyncio
import time
from pathlib import Path
from typing import Generic, TypeVar

import httpx
import numpy as np
from numpy.typing import NDArray

from serve.client.calls import THROUGH_PROXY, Call, manifest_call, segment_call
from serve.contract.closing import AsyncClosing, Closing
from serve.contract.errors import BackendUnavailableError, SettingsError
from serve.contract.manifest import Manifest
from serve.contract.proxies import is_proxied
from serve.images.mpp import FROM_REQUEST, MppSource
from serve.inference.patience import Patience
from serve.inference.segmenter import Segmentation

C = TypeVar("C", httpx.Client, httpx.AsyncClient)
T = TypeVar("T")
_NO_ANSWER = (httpx.RequestError, httpx.InvalidURL)
_LOST = (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)
_SLOW = (httpx.ReadTimeout, httpx.WriteTimeout)


def needs_environment(url: str) -> bool:
    """Whether an address is reached through a proxy or with certificates that variables name.

    Where it is not, they cannot be in the way.
    """
    return url.startswith("https://") or is_proxied(url)


class _HttpClient(Generic[C]):
    """What both clients share: the connections, and which failures are worth another attempt."""

    _transport: type[C]

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 300.0,
        api_key: str | None = None,
        patience_s: float = 120.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise BackendUnavailableError(
                f"{url!r} is not the address of a service; expected http://host:port."
            )
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise SettingsError("the API key is not printable ASCII text, as keys are.")
        self._url = url.rstrip("/")
        self._patience_s = patience_s
        self._has_answered = False
        headers = {} if api_key is None else {"X-API-Key": api_key}
        try:
            self._client: C = self._transport(
                timeout=timeout_s, headers=headers, trust_env=needs_environment(url)
            )
        except (OSError, ValueError, ImportError, httpx.InvalidURL) as error:
            raise SettingsError(
                f"the variables of this environment allow no calls: {str(error).rstrip('.')}. "
                "Check HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and SSL_CERT_DIR."
            ) from error

    def _pause_s(self, outcome: httpx.Response | Exception, patience: Patience) -> float | None:
        """Seconds to wait before the next attempt; None if the outcome is final."""
        if isinstance(outcome, httpx.Response):
            self._has_answered = True
            match outcome.status_code:
                case 429:
                    return patience.after_refusal(_retry_after_s(outcome))
                case 502 | 503:
                    return patience.after_failure(_retry_after_s(outcome))
            return None
        # A worker that is lost takes its connections with it, and another one answers soon. A
        # service that never answered is probably not there, and one that is too slow stays so.
        was_lost = isinstance(outcome, _LOST)
        is_away = isinstance(outcome, httpx.ConnectError) and self._has_answered
        if not (was_lost or is_away):
            return None
        self._has_answered = True
        return patience.after_failure()

    def _result(self, call: Call[T], outcome: httpx.Response | Exception) -> T:
        if isinstance(outcome, httpx.Response):
            return call.result(outcome, self._url)
        advice = "Start one with `python -m serve http`, or correct the address."
        if isinstance(outcome, _SLOW):
            advice = "Send a smaller image, or give the client more time."
        if isinstance(outcome, httpx.DecodingError):
            advice = "What it sends cannot be unpacked: check the proxies before it."
        if "CERTIFICATE_VERIFY_FAILED" in str(outcome):
            advice = (
                "If your own authority signed it, set SSL_CERT_FILE to the authority's PEM file."
            )
        if is_proxied(self._url):
            advice += THROUGH_PROXY
        raise BackendUnavailableError(
            f"no answer from a service at {self._url}: {outcome}. {advice}"
        ) from outcome


class HttpClient(_HttpClient[httpx.Client], Closing):
    """Segments images through the HTTP service; many threads may use it at once.

    Args:
        url: the service's address, such as http://127.0.0.1:3000.
        timeout_s: seconds to wait for one answer.
        api_key: sent with every request.
        patience_s: seconds during which a request is repeated if the service is busy (429), has no
            model (503) or restarts (a proxy's 502, a lost connection). The pauses are those that
            the service asks for with Retry-After, or grow.

    Raises:
        BackendUnavailableError: `url` is not the address of a service.
        SettingsError: `api_key` cannot be one, or a variable names a proxy or certificates that
            cannot be used.
    """

    _transport = httpx.Client
    _manifest: Manifest | None = None

    @property
    def manifest(self) -> Manifest:
        """The manifest of the service's model; requested once.

        Raises:
            BackendUnavailableError: the service does not answer, or not as FocalPath's does.
        """
        if self._manifest is None:
            self._manifest = self._ask(manifest_call())
        return self._manifest

    def segment(
        self,
        image: NDArray[np.uint8] | bytes | Path,
        *,
        mpp: float | None = None,
        mpp_source: MppSource = FROM_REQUEST,
        with_probabilities: bool = False,
    ) -> Segmentation:
        """Segment an image of any size up to the service's limits.

        Args:
            image: (H, W, 3) uint8, RGB in [0, 255], which is sent as a PNG; or the path or the
                content of an image file, which is sent unchanged. The service reads the um per
                pixel that a file states.
            mpp: um per pixel of the image; None takes the file's, or else the model's.
            mpp_source: where `mpp` comes from, if it is given.
            with_probabilities: also return the probabilities of all classes.

        Raises:
            ImageError: the file cannot be read, or the service refuses the image.
            OptionError: `mpp` is out of range.
            BackendUnavailableError: the service or its backend does not answer.
        """
        return self._ask(
            segment_call(
                image, mpp=mpp, mpp_source=mpp_source, with_probabilities=with_probabilities
            )
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _ask(self, call: Call[T]) -> T:
        patience = Patience(self._patience_s)
        while True:
            outcome: httpx.Response | Exception
            try:
                outcome = self._client.request(call.method, self._url + call.path, **call.options)
            except _NO_ANSWER as error:
                outcome = error
            pause_s = self._pause_s(outcome, patience)
            if pause_s is None:
                return self._result(call, outcome)
            time.sleep(pause_s)


class AsyncHttpClient(_HttpClient[httpx.AsyncClient], AsyncClosing):
    """`HttpClient`, to await; takes the same arguments."""

    _transport = httpx.AsyncClient

    async def manifest(self) -> Manifest:
        """The manifest of the service's model; see `HttpClient.manifest`."""
        return await self._ask(manifest_call())

    async def segment(
        self,
        image: NDArray[np.uint8] | bytes | Path,
        *,
        mpp: float | None = None,
        mpp_source: MppSource = FROM_REQUEST,
        with_probabilities: bool = False,
    ) -> Segmentation:
        """Segment an image of any size; see `HttpClient.segment`."""
        call = await asyncio.to_thread(  # encoding takes a while
            segment_call,
            image,
            mpp=mpp,
            mpp_source=mpp_source,
            with_probabilities=with_probabilities,
        )
        return await self._ask(call)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _ask(self, call: Call[T]) -> T:
        patience = Patience(self._patience_s)
        while True:
            outcome: httpx.Response | Exception
            try:
                outcome = await self._client.request(
                    call.method, self._url + call.path, **call.options
                )
            except _NO_ANSWER as error:
                outcome = error
            pause_s = self._pause_s(outcome, patience)
            if pause_s is None:
                return await asyncio.to_thread(self._result, call, outcome)
            await asyncio.sleep(pause_s)


def _retry_after_s(response: httpx.Response) -> float:
    """The pause that the service asks for, in seconds; 0 if it asks for none, or names a date."""
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isdecimal() else 0.0
