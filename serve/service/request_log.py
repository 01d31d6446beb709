"""Records each request: its id, its span, a line in the log, and its metrics."""

import logging
import re
import time
import uuid
from collections.abc import Collection
from typing import Any

from opentelemetry import propagate, trace
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.service.logs import RequestRecord, request_context
from serve.service.telemetry import Telemetry

REQUEST_ID_HEADER = "X-Request-ID"
CLIENT_CLOSED_REQUEST = 499
"""Status of a request whose client left before the answer; only in the log and the metrics."""
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_log = logging.getLogger("serve.access_log")


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
    # A copy: where the client has left, a thread may still be at work and end a stage.
    fields |= {f"{stage}_ms": round(ms, 1) for stage, ms in record.stage_ms.copy().items()}
    _log.info("answered", extra={"fields": fields})
