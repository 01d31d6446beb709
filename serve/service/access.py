"""API keys, from a file that is read again when it changes.

A line of the file is `name:key` or `name:sha256:<64 hex digits>`, the latter the SHA-256 of the
key; `#` starts a comment. A key is never logged, its name is.
"""

import hashlib
import hmac
import logging
import re
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.contract.errors import AccessError, SettingsError
from serve.contract.key_file import read_key_file
from serve.service.error_answers import error_answer
from serve.service.logs import current_request
from serve.service.page import VIEWER_PATH

OPEN_PATHS = frozenset({"/", "/favicon.ico", "/metrics", "/openapi.json"})
"""Paths that need no key: the page, the OpenAPI document, and the metrics."""
_MIN_KEY_LENGTH = 16
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_EXPECTED = (
    "Expected a line `name:key`, the name of letters, digits and ._@-, the key of at least "
    f"{_MIN_KEY_LENGTH} printable characters without a space, or `name:sha256:<64 hex digits>`."
)
_log = logging.getLogger(__name__)


_Key = tuple[str, bytes]
"""Its name, and its SHA-256: all have the same length, and a memory dump shows no key."""


class ApiKeys:
    """The keys of a file.

    Raises:
        SettingsError: the file cannot be read, has no key, or has a line that is not a key.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = _stamp(path)
        self._keys = _read(path)

    def name_of(self, presented: bytes) -> str | None:
        """The name of the key; None if it is unknown. Takes equally long for every wrong key."""
        self._read_again_if_changed()
        digest = hashlib.sha256(presented).digest()
        found = None
        for name, known in self._keys:  # to the end: the time must not tell which key was close
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def _read_again_if_changed(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = _read(self._path)
        except SettingsError as error:
            _log.error("the old API keys stay in use: %s", error)
        else:
            _log.info("read %d API keys again", len(self._keys))


class AccessControl:
    """ASGI middleware that answers 401 without a valid key, unless the path is open."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] != "http" or _is_open(scope):
            await self._app(scope, receive, send)
            return
        presented = _presented_key(Headers(scope=scope))
        name = None if presented is None else self._keys.name_of(presented)
        if name is None:
            found = "no API key" if presented is None else "an unknown API key"
            error = AccessError(
                f"The request has {found}. Send `Authorization: Bearer KEY` or `X-API-Key`."
            )
            await error_answer(error, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        if (record := current_request()) is not None:
            record.key_name = name
        await self._app(scope, receive, send)


def _is_open(scope: Scope) -> bool:
    path: str = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (
        path in OPEN_PATHS or path.startswith(VIEWER_PATH)
    )


def _presented_key(headers: Headers) -> bytes | None:
    if "x-api-key" in headers:
        return headers["x-api-key"].encode("latin-1")
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip().encode("latin-1") if scheme.lower() == "bearer" and key.strip() else None


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read(path: Path) -> tuple[_Key, ...]:
    keys = tuple(
        _parse(line.strip(), f"{path}, line {number}")
        for number, line in enumerate(read_key_file(path), start=1)
        if line.strip() and not line.startswith("#")
    )
    if not keys:
        raise SettingsError(f"{path} has no API key. {_EXPECTED}")
    return keys


def _parse(line: str, place: str) -> _Key:
    name, _, key = line.partition(":")
    kind, _, digest = key.partition(":")
    if _NAME.fullmatch(name):
        if kind == "sha256" and _DIGEST.fullmatch(digest.lower()):
            return name, bytes.fromhex(digest)
        if kind != "sha256" and len(key) >= _MIN_KEY_LENGTH and key.isascii() and " " not in key:
            return name, hashlib.sha256(key.encode()).digest()
    raise SettingsError(f"{place} is not an API key. {_EXPECTED}")  # the line may hold a key
