"""What uvicorn answers by itself, before any application sees a request."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

import serve.service.protocol
from serve.contract.errors import FormError, UploadTooSlowError
from serve.service.protocol import ServiceProtocol
from tests.support.raw_http import INVALID_HTTP, POST, TIMEOUT_S, address_of, exchange

pytestmark = pytest.mark.slow

MOMENT_S = 0.1
T = TypeVar("T")


@pytest.mark.parametrize("kind", INVALID_HTTP)
def test_invalid_http_is_a_400_in_json(kind: str, service_url: str) -> None:
    status, head, body = exchange(address_of(service_url), INVALID_HTTP[kind])
    assert status == 400
    assert b"content-type: application/json" in head.lower()
    assert json.loads(body)["code"] == "http_invalid"


@pytest.mark.parametrize(
    "target", ["http://x/readyz", "HTTPS://x:1/readyz", "/readyz?a", "/readyz"]
)
def test_a_request_may_name_the_whole_address(target: str, service_url: str) -> None:
    sent = f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    assert exchange(address_of(service_url), sent)[0] == 200


def test_a_websocket_is_answered_as_the_request_that_it_comes_with(service_url: str) -> None:
    upgrade = b"Connection: Upgrade, close\r\nUpgrade: websocket\r\nContent-Length: 0\r\n\r\n"
    status, _, body = exchange(address_of(service_url), POST + upgrade)
    assert status == 400
    assert json.loads(body)["code"] == FormError.code


def _with_server(
    work: Callable[[socket.socket], T], answer: bytes = b"answer", app: ASGIApp | None = None
) -> T:
    """Do `work`, in a thread, with a connection to a server that speaks the protocol."""

    def connected(address: tuple[str, int]) -> T:
        with socket.create_connection(address, timeout=TIMEOUT_S) as connection:
            return work(connection)

    async def main() -> T:
        config = uvicorn.Config(
            app or PlainTextResponse(answer),
            http=ServiceProtocol,
            log_config=None,
            lifespan="off",
            timeout_keep_alive=0,
        )
        server = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            serving = asyncio.create_task(server._serve([listening]))
            try:
                return await asyncio.to_thread(connected, listening.getsockname())
            finally:
                server.should_exit = True
                await serving

    return asyncio.run(main())


@pytest.fixture
def skip(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Has so many seconds pass for the timers of the server.

    It looks at the clock ten times a second.
    """
    skipped = 0.0

    def skip(seconds: float) -> None:
        nonlocal skipped
        skipped += seconds

    monkeypatch.setattr(asyncio.BaseEventLoop, "time", lambda _: time.monotonic() + skipped)
    return skip


def _until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def _read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65_536), b""))


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\n"])
def test_a_head_that_does_not_end_is_a_408(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.service.protocol, "HEAD_TIMEOUT_S", MOMENT_S)

    def work(connection: socket.socket) -> bytes:
        connection.sendall(sent)
        return _read_all(connection)

    head, _, body = _with_server(work).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    assert json.loads(body)["code"] == UploadTooSlowError.code


def test_the_second_head_of_a_connection_has_a_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(connection: socket.socket) -> bytes:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        first = connection.recv(65_536)
        monkeypatch.setattr(serve.service.protocol, "HEAD_TIMEOUT_S", MOMENT_S)
        connection.sendall(b"GET / HT")
        return first + _read_all(connection)

    received = _with_server(work)
    assert received.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 408" in received


def test_a_connection_may_rest_for_longer_than_uvicorn_lets_it() -> None:
    def work(connection: socket.socket) -> list[bytes]:
        answers = []
        for _ in range(2):
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            received = b"-"
            while received and not received.endswith(b"answer"):
                received = connection.recv(65_536)
            answers.append(received[-6:])
            time.sleep(2 * MOMENT_S)
        return answers

    assert _with_server(work) == [b"answer", b"answer"]


def test_a_body_may_take_longer_than_a_head(skip: Callable[[float], None]) -> None:
    has_head = threading.Event()

    async def read_and_answer(scope: Scope, receive: Receive, send: Send) -> None:
        has_head.set()
        await Request(scope, receive).body()
        await PlainTextResponse("answer")(scope, receive, send)

    def work(connection: socket.socket) -> bytes:
        connection.sendall(POST + b"Connection: close\r\nContent-Length: 2\r\n\r\n")
        assert has_head.wait(TIMEOUT_S)
        skip(2 * serve.service.protocol.HEAD_TIMEOUT_S)
        time.sleep(3 * MOMENT_S)
        connection.sendall(b"ab")
        return _read_all(connection)

    assert _with_server(work, app=read_and_answer).startswith(b"HTTP/1.1 200")


GET = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
LARGE = bytes(30_000_000)
"""More than the kernel takes for a caller."""


@pytest.mark.parametrize("reads", [False, True], ids=["does not read", "reads slowly"])
def test_who_reads_slowly_gets_all_of_the_answer_and_who_does_not_is_hung_up_on(
    reads: bool, skip: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    protocols: list[ServiceProtocol] = []
    connected = ServiceProtocol.connection_made

    def note(self: ServiceProtocol, transport: asyncio.Transport) -> None:
        connected(self, transport)
        protocols.append(self)

    monkeypatch.setattr(ServiceProtocol, "connection_made", note)

    def waiting() -> int:
        """Bytes that wait for the reader, besides those that the kernel has taken."""
        return protocols[0].transport.get_write_buffer_size() if protocols else 0

    def work(connection: socket.socket) -> int:
        """Bytes until the service hangs up."""
        connection.sendall(GET)
        _until(waiting)
        num_bytes, deadline = 0, time.monotonic() + TIMEOUT_S
        while (before := waiting()) and time.monotonic() < deadline:
            while reads and waiting() == before:
                num_bytes += len(connection.recv(200_000))
            skip(serve.service.protocol.READ_PAUSE_S)
            time.sleep(2 * MOMENT_S)
        with contextlib.suppress(ConnectionError):
            num_bytes += len(_read_all(connection))
        return num_bytes

    assert (_with_server(work, LARGE) > len(LARGE)) == reads


LONG = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 60000000\r\n\r\n"


def _is_hung_up_on(connection: socket.socket, pause_s: float) -> bool:
    """Send now and then until that fails."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        time.sleep(pause_s)
        try:
            connection.sendall(b"x")
        except ConnectionError:
            return True
    return False


def test_an_answer_before_the_end_of_the_body_ends_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve.service.protocol, "LINGER_PAUSE_S", MOMENT_S)

    def work(connection: socket.socket) -> bytes:
        connection.sendall(LONG)
        received = _read_all(connection)
        assert _is_hung_up_on(connection, 3 * MOMENT_S)
        return received

    received = _with_server(work)
    assert b"connection: close" in received.lower()
    assert received.endswith(b"answer")


def test_who_goes_on_sending_still_gets_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("LINGER_S", "LINGER_PAUSE_S"):  # this process may have to wait for a core
        monkeypatch.setattr(serve.service.protocol, limit, TIMEOUT_S)

    def work(connection: socket.socket) -> bytes:
        connection.sendall(LONG)
        time.sleep(MOMENT_S)  # it is answered meanwhile
        connection.sendall(bytes(60_000_000))
        return _read_all(connection)

    assert _with_server(work).endswith(b"answer")


def test_who_sends_without_end_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.service.protocol, "LINGER_S", 5 * MOMENT_S)

    def work(connection: socket.socket) -> bool:
        connection.sendall(LONG)
        return _is_hung_up_on(connection, MOMENT_S / 10)

    assert _with_server(work)
