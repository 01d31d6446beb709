"""HTTP/1.1 as the service speaks it: uvicorn's, with errors in JSON and no patience without end.

What is no HTTP never reaches an application: uvicorn answers it itself, in plain text, waits for
the rest of a request's head as long as a caller likes, as well as for a caller who does not read
the answer, and takes websockets, of which the service has none.
"""

import asyncio
import json

import h11
import uvicorn.protocols.http.auto
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 20.0
"""Seconds that a connection may take for the head of a request."""
KEEP_ALIVE_S = 75
"""Seconds that a connection may rest between requests: longer than clients and load balancers keep
one, so that they hang up, and never send a request into a connection that is being closed."""
READ_PAUSE_S = 60.0
"""Seconds without reading any of an answer after which a caller is hung up on."""
_NO_HTTP = "The request is no HTTP/1.1, or its line and headers are longer than 64 KiB."
_TOO_SLOW = f"The head of the request took longer than {HEAD_TIMEOUT_S:g} s."


class ServiceProtocol(H11Protocol):
    """One connection."""

    _head_timer: asyncio.TimerHandle | None = None
    _answer_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A caller has connected: wait for a head, but not forever."""
        super().connection_made(transport)
        self.timeout_keep_alive = KEEP_ALIVE_S  # uvicorn's 5 s are httpx's as well: a race
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes of a head or of a body."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The caller has left, or was sent away."""
        self._forget_head_timer()
        self._forget_answer_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The caller reads more slowly than the answer is written: see that it does read."""
        super().pause_writing()
        self._watch_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """The caller has read nearly everything."""
        self._forget_answer_timer()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP; called by uvicorn."""
        self._refuse(400, _NO_HTTP)

    def _should_upgrade_to_ws(self) -> bool:
        return False

    def _watch_head(self) -> None:
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._forget_head_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, 408, _TOO_SLOW)

    def _forget_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _watch_reader(self, num_waiting: int) -> None:
        def check() -> None:
            now_waiting = self.transport.get_write_buffer_size()
            if now_waiting >= num_waiting:
                self.transport.abort()  # else the answer, and the request's place, were kept
            else:
                self._watch_reader(now_waiting)

        self._forget_answer_timer()
        self._answer_timer = self.loop.call_later(READ_PAUSE_S, check)

    def _forget_answer_timer(self) -> None:
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None

    def _refuse(self, status: int, message: str) -> None:
        """Answer with an error, unless another answer has begun, and hang up."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = [("content-type", "application/json"), ("connection", "close")]
            for event in (
                h11.Response(status_code=status, headers=headers),
                h11.Data(json.dumps({"error": message}).encode()),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def use_service_protocol() -> None:
    """Have uvicorn speak it; BentoML, which starts uvicorn, has no setting for the protocol."""
    uvicorn.protocols.http.auto.AutoHTTPProtocol = ServiceProtocol
