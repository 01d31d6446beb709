"""The middleware around the endpoints: request id, log, metrics, CORS, API keys, limits.

`RequestLog` comes first, so that it sees every answer. CORS comes before the keys, since a
browser's preflight request has none. The limits come last: a request without a key takes no place.
"""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, Collection
from contextlib import AbstractAsyncContextManager
from typing import Any
from urllib.parse import quote

from opentelemetry import propagate, trace
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import RedirectResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.contract.errors import BusyError, TookTooLongError
from serve.service.access import AccessControl, ApiKeys
from serve.service.error_answers import EXCEPTION_HANDLERS, error_answer
from serve.service.kept import KEEP_HEADER
from serve.service.telemetry import RequestRecord, Telemetry, request_context
from serve.service.work_queue import WorkQueue
from serve.service.worker import MPP_HEADER, MPP_SOURCE_HEADER
from serve.settings import ServeSettings

REQUEST_ID_HEADER = "X-Request-ID"
CLIENT_CLOSED_REQUEST = 499
"""Status of a request whose client left before the answer; only in the log and the metrics."""
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_log = logging.getLogger("serve.access_log")


def build_gateway(
    app: Starlette, settings: ServeSettings, telemetry: Telemetry, queue: WorkQueue | None = None
) -> Starlette:
    """Put the middleware around the endpoints.

    Raises:
        SettingsError: the file of API keys cannot be used.
    """
    middleware = [Middleware(RequestLog, telemetry=telemetry, paths=_paths(app))]
    if settings.root_path:
        middleware.insert(0, Middleware(RootPath, root_path=settings.root_path))
    if settings.allowed_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.allowed_origins,
                allow_methods=("GET", "POST", "DELETE"),
                allow_headers=(
                    "Authorization",
                    "Content-Type",
                    "X-API-Key",
                    KEEP_HEADER,
                    REQUEST_ID_HEADER,
                    "traceparent",
                ),
                expose_headers=(REQUEST_ID_HEADER, "Retry-After", MPP_HEADER, MPP_SOURCE_HEADER),
            )
        )
    if settings.api_keys_file is not None:
        middleware.append(Middleware(AccessControl, keys=ApiKeys(settings.api_keys_file)))
    middleware.append(
        Middleware(
            RequestLimits,
            max_requests=settings.max_waiting,
            max_uploads=settings.max_uploads,
            timeout_s=settings.request_timeout_s,
            queue=queue,
        )
    )
    return Starlette(
        routes=[Mount("/", app)],  # which takes no path with a line break in it
        middleware=middleware,
        exception_handlers={HTTPException: EXCEPTION_HANDLERS[HTTPException]},
        lifespan=_lifespan_of(app),
    )


def _lifespan_of(app: Starlette) -> Callable[[Starlette], AbstractAsyncContextManager[Any]]:
    return lambda _: app.router.lifespan_context(app)


class RootPath:
    """ASGI middleware for a service that a proxy publishes under a path.

    Everything behind it sees the same paths, whether the proxy keeps the prefix or strips it.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take the prefix off the path, and pass the request on."""
        if scope["type"] == "http":
            path: str = scope["path"]
            if path == self._root_path:  # the page's addresses are relative to the slash
                await RedirectResponse(f"{self._root_path}/", 308)(scope, receive, send)
                return
            path = path.removeprefix(self._root_path) if self._is_below(path) else path
            scope = {**scope, "path": path, "raw_path": quote(path).encode()}
        await self._app(scope, receive, send)

    def _is_below(self, path: str) -> bool:
        return path.startswith(f"{self._root_path}/")


class RequestLog:
    """ASGI middleware that gives each request an id, a span, a line in the log and its metrics."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry, paths: Collection[str]) -> None:
        self._app = app
        self._telemetry = telemetry
        self._paths = frozenset(paths)
        self._tracer = trace.get_tracer(__name__)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and record its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = RequestRecord(_request_id(headers))
        endpoint = self._endpoint(scope["path"])
        status = CLIENT_CLOSED_REQUEST
        start = time.perf_counter()

        async def recorded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = record.request_id
            await send(message)

        with (
            request_context(record),
            self._tracer.start_as_current_span(
                f"{scope['method']} {endpoint}",
                context=propagate.extract(headers),
                kind=trace.SpanKind.SERVER,
            ) as span,
            self._telemetry.in_progress(),
        ):
            try:
                await self._app(scope, receive, recorded)
            finally:
                seconds = time.perf_counter() - start
                self._telemetry.observe_answer(endpoint, status, seconds)
                span.set_attributes(_attributes(scope, endpoint, status, record))
                if endpoint != "/metrics":
                    _write_line(scope, status, seconds, record)

    def _endpoint(self, path: str) -> str:
        """The path as a metric's label; a known one, since clients can invent any number."""
        if path in self._paths:
            return path
        folder = f"/{path.split('/')[1]}/"
        return folder if folder in self._paths else "other"


class _Caller:
    """The client of a request, which may leave before the answer.

    Args:
        receive: of the request.
        on_body: called once, when the whole body has arrived; may raise to refuse the request.
    """

    def __init__(self, receive: Receive, on_body: Callable[[], None]) -> None:
        self._receive = receive
        self._on_body = on_body
        self._body_read = asyncio.Event()

    async def receive(self) -> Message:
        """The next part of the body."""
        message = await self._receive()
        if not message.get("more_body", False) and not self._body_read.is_set():
            self._body_read.set()
            if message["type"] == "http.request":
                self._on_body()
        return message

    async def leaves(self) -> None:
        """Return when the client has left. Starts to look once the body has been read."""
        await self._body_read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass


class RequestLimits:
    """ASGI middleware that answers 429 when too many requests wait, and 504 to slow ones.

    A request takes a place among those that wait when its body is there, so that slow uploads keep
    none from others; how many upload at the same time is bounded apart. When a client leaves, its
    place is free at once, and work that has not begun is dropped. GET and HEAD are not counted:
    they take no place of an image.

    Args:
        app: the application behind it.
        max_requests: how many may be at work or wait.
        max_uploads: how many may send their bodies.
        timeout_s: seconds until a 504, from the request's start.
        queue: of the images, which refuses requests while it is full.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_requests: int,
        max_uploads: int,
        timeout_s: float,
        queue: WorkQueue | None = None,
    ) -> None:
        self._app = app
        self._max_requests = max_requests
        self._max_uploads = max_uploads
        self._timeout_s = timeout_s
        self._queue = queue
        self._requests = 0
        self._uploads = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on within the limits."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        refusal = self._refusal()  # at once, before a body is sent for nothing
        if refusal is not None:
            await error_answer(refusal)(scope, receive, send)
            return
        is_waiting = False

        def take_place() -> None:
            nonlocal is_waiting
            if is_waiting:
                return
            if self._requests >= self._max_requests:
                raise self._too_many()
            is_waiting = True
            self._uploads -= 1
            self._requests += 1

        self._uploads += 1
        try:
            if not _has_body(scope):
                take_place()
            await self._within_time(scope, _Caller(receive, take_place), send)
        finally:
            if is_waiting:
                self._requests -= 1
            else:
                self._uploads -= 1

    def _refusal(self) -> BusyError | None:
        if self._requests >= self._max_requests:
            return self._too_many()
        if self._uploads >= self._max_uploads:
            return BusyError(f"{self._uploads} uploads are under way already. Try again later.")
        # What it costs is not known yet, so only where not even one tile would be taken.
        return self._queue.refusal() if self._queue else None

    def _too_many(self) -> BusyError:
        return BusyError(
            f"{self._max_requests} requests are waiting already. Try again later.",
            retry_after_s=self._queue.seconds_for_one() if self._queue else 1,
        )

    async def _within_time(self, scope: Scope, caller: _Caller, send: Send) -> None:
        limit = asyncio.timeout(self._timeout_s)
        started = has_left = False

        async def watch() -> None:
            nonlocal has_left
            await caller.leaves()
            if not started:
                has_left = True
                limit.reschedule(0)

        async def first_ends_the_limit(message: Message) -> None:
            nonlocal started
            if not started:
                started = True
                limit.reschedule(None)  # an answer that has begun cannot become an error
            await send(message)

        watching = asyncio.create_task(watch())
        try:
            async with limit:
                try:
                    await self._app(scope, caller.receive, first_ends_the_limit)
                finally:
                    watching.cancel()
        except TimeoutError:
            if started or not limit.expired():
                raise
            if has_left:
                return  # `RequestLog` says so
            error = TookTooLongError(
                f"The request took longer than {self._timeout_s:g} s. Send a smaller image."
            )
            await error_answer(error)(scope, caller.receive, send)


def _paths(app: Starlette) -> set[str]:
    """The endpoints' paths; one with a parameter is cut before it, and ends in a slash."""
    return {route.path.partition("{")[0] for route in app.routes if isinstance(route, Route)}


def _has_body(scope: Scope) -> bool:
    """Whether a body is to arrive, by the request's head."""
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _request_id(headers: Headers) -> str:
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex


def _attributes(
    scope: Scope, endpoint: str, status: int, record: RequestRecord
) -> dict[str, str | int]:
    return {
        "http.request.method": scope["method"],
        "http.route": endpoint,
        "http.response.status_code": status,
        "focalpath.request_id": record.request_id,
    }


def _write_line(scope: Scope, status: int, seconds: float, record: RequestRecord) -> None:
    client = scope.get("client")
    fields: dict[str, Any] = {
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "duration_ms": round(1000 * seconds, 1),
        "client": client[0] if client else None,
    }
    if record.key_name is not None:
        fields["key"] = record.key_name
    if record.tiles is not None:
        fields["tiles"] = record.tiles
    fields |= {f"{stage}_ms": round(ms, 1) for stage, ms in record.stage_ms.items()}
    _log.info("answered", extra={"fields": fields})
