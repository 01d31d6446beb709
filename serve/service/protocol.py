"""Times out slow clients, and rejects requests that are not valid HTTP/1.1 with an error in JSON.

uvicorn answers these before any application sees them: it rejects invalid HTTP in plain text, and
waits without a limit for the rest of a request's head, for a client that does not read its answer,
and for the rest of a body that has been answered already.
"""

import asyncio
import json
import re
from itertools import chain
from typing import Any

import h11
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.contract.errors import UploadTooSlowError

HEAD_TIMEOUT_S = 20.0
"""Seconds that a connection may take for the head of a request."""
KEEP_ALIVE_S = 75
"""Seconds that a connection may idle between requests: longer than clients and load balancers keep
one. So they close it first, and never send a request into a connection that is being closed."""
READ_PAUSE_S = 60.0
"""Seconds after which a client that does not read its answer is disconnected."""
LINGER_S, LINGER_PAUSE_S = 30.0, 5.0
"""Seconds, in total and without new bytes, for which the rest of a body is read and dropped after
an early answer. A client that is still sending would lose the answer if the connection closed at
once."""
MAX_HEAD_BYTES = 64 * 1024
"""Most bytes of a request's line and headers."""
_ABSOLUTE = re.compile(rb"(?i:https?)://[^/?#]+([/?].*)?")
_CLOSE = (b"connection", b"close")
_INVALID_HTTP = (
    "The request is not valid HTTP/1.1, or its line and headers are longer than 64 KiB, or it has "
    "both a Content-Length and a Transfer-Encoding."
)
_TOO_SLOW = f"The head of the request took longer than {HEAD_TIMEOUT_S:g} s."


class _StrictConnection(h11.Connection):
    """Refuses requests that two readers may understand differently (RFC 9112, section 6.1)."""

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """See `h11.Connection.next_event`."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            if {b"content-length", b"transfer-encoding"} <= names:
                raise h11.RemoteProtocolError("both Content-Length and Transfer-Encoding")
            size = len(event.target) + sum(map(len, chain(*event.headers)))
            if size > MAX_HEAD_BYTES:  # h11 counts only those that arrive in parts
                raise h11.RemoteProtocolError("a line or headers of too many bytes")
            return _in_origin_form(event)
        return event


def _in_origin_form(request: h11.Request) -> h11.Request:
    """A request for a path, also where it names the whole address (RFC 9112, section 3.2.2)."""
    if request.target.startswith(b"/"):
        return request
    found = _ABSOLUTE.fullmatch(request.target)
    if found is None:
        raise h11.RemoteProtocolError("the request is for no path")
    return h11.Request(
        method=request.method,
        target=b"/" + found[1].removeprefix(b"/"),
        headers=request.headers,
        http_version=request.http_version,
    )


class ServiceProtocol(H11Protocol):
    """One connection."""

    _head_timer: asyncio.TimerHandle | None = None
    _answer_timer: asyncio.TimerHandle | None = None
    _linger_timer: asyncio.TimerHandle | None = None
    _linger_until_s: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected: wait for a head, but not forever."""
        super().connection_made(transport)
        limit = self.config.h11_max_incomplete_event_size
        self.conn = _StrictConnection(h11.SERVER, *(() if limit is None else (limit,)))
        self.app, self._answering = self._answer, self.app
        self.timeout_keep_alive = KEEP_ALIVE_S  # uvicorn's 5 s are httpx's as well: a race
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes of a head or of a body."""
        if self._linger_until_s is not None:
            self._watch_lingerer()
            return
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left, or was disconnected."""
        self._forget_head_timer()
        self._forget_answer_timer()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client reads more slowly than the answer is written: check that it reads at all."""
        super().pause_writing()
        self._watch_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """The client has read nearly everything."""
        self._forget_answer_timer()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP; called by uvicorn."""
        self._refuse(400, "http_invalid", _INVALID_HTTP)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer; close the connection if it answers before the body's end."""
        cycle = self.cycle

        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start" and cycle.more_body:
                message = {**message, "headers": [*message.get("headers", ()), _CLOSE]}
                cycle.transport = _Lingering(self)  # type: ignore[assignment]
            await send(message)

        await self._answering(scope, receive, send_and_close)

    def linger(self) -> None:
        """End the answer, and keep reading for a while."""
        self._linger_until_s = self.loop.time() + LINGER_S
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._watch_lingerer()

    def _watch_lingerer(self) -> None:
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        assert self._linger_until_s is not None
        at_s = min(self._linger_until_s, self.loop.time() + LINGER_PAUSE_S)
        self._linger_timer = self.loop.call_at(at_s, self.transport.close)

    def _watch_head(self) -> None:
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._forget_head_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(
                HEAD_TIMEOUT_S, self._refuse, 408, UploadTooSlowError.code, _TOO_SLOW
            )

    def _forget_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _watch_reader(self, num_waiting: int) -> None:
        def check() -> None:
            now_waiting = self.transport.get_write_buffer_size()
            if now_waiting >= num_waiting:
                self.transport.abort()  # it would keep the answer and the place of its request
            else:
                self._watch_reader(now_waiting)

        self._forget_answer_timer()
        self._answer_timer = self.loop.call_later(READ_PAUSE_S, check)

    def _forget_answer_timer(self) -> None:
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer with an error, unless another answer has begun, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = [("content-type", "application/json"), ("connection", "close")]
            for event in (
                h11.Response(status_code=status, headers=headers),
                h11.Data(json.dumps({"error": message, "code": code}).encode()),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _Lingering:
    """A connection's transport for an answer after which it lingers."""

    def __init__(self, protocol: ServiceProtocol) -> None:
        self._protocol = protocol

    def __getattr__(self, name: str) -> Any:
        return getattr(self._protocol.transport, name)

    def close(self) -> None:
        """Called by uvicorn when the answer has been written."""
        self._protocol.linger()
