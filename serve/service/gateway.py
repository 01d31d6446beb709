"""The middleware around the endpoints: request id, log, metrics, CORS, API keys, limits.

`RequestLog` comes first, so that it sees every answer. CORS comes before the keys, since a
browser's preflight request has none. The limits come last: a request without a key takes no place.
"""

from urllib.parse import quote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import RedirectResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.service.access import AccessControl, ApiKeys
from serve.service.error_answers import EXCEPTION_HANDLERS
from serve.service.kept import KEEP_HEADER
from serve.service.request_limits import RequestLimits
from serve.service.request_log import REQUEST_ID_HEADER, RequestLog
from serve.service.worker import MPP_HEADER, MPP_SOURCE_HEADER
from serve.settings import ServeSettings

IS_HEAD = "focalpath.is_head"
"""In the scope of a request whose body nobody gets, for endpoints whose body costs much."""


def build_gateway(app: Starlette, settings: ServeSettings) -> Starlette:
    """Put the middleware around the endpoints, whose state has the telemetry and the worker.

    Raises:
        SettingsError: the file of API keys cannot be used.
    """
    middleware = [Middleware(RequestLog, telemetry=app.state.telemetry, paths=_paths(app))]
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
            queue=app.state.worker.queue,
        )
    )
    middleware.append(Middleware(HeadRequests))
    return Starlette(
        routes=[Mount("/", app)],  # which takes no path with a line break in it
        middleware=middleware,
        exception_handlers={HTTPException: EXCEPTION_HANDLERS[HTTPException]},
    )


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
            if path.startswith(f"{self._root_path}/"):
                path = path.removeprefix(self._root_path)
            scope = {**scope, "path": path, "raw_path": quote(path).encode()}
        await self._app(scope, receive, send)


class HeadRequests:
    """ASGI middleware that answers HEAD as GET, as HTTP asks of every resource.

    The server, which saw the HEAD, sends no body.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass HEAD on as a GET."""
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET", IS_HEAD: True}
        await self._app(scope, receive, send)


def _paths(app: Starlette) -> set[str]:
    """The endpoints' paths; one with a parameter is cut before it, and ends in a slash."""
    return {route.path.partition("{")[0] for route in app.routes if isinstance(route, Route)}
