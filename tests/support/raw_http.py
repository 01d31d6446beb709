"""HTTP as bytes over a socket: requests that no client library would send."""

import contextlib
import socket
from urllib.parse import urlsplit

TIMEOUT_S = 120
"""Seconds without a byte after which a service that should answer or hang up fails the test."""
POST = b"POST /segment HTTP/1.1\r\nHost: x\r\n"
FORM = b"Content-Type: multipart/form-data; boundary=x\r\n"
INVALID_HTTP = {
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "words": b"hello\r\n\r\n",
    "header of 2 MB": POST + b"X-A: " + b"a" * 2_000_000 + b"\r\n\r\n",
    "header of 100 kB at once": POST + b"X-A: " + b"a" * 100_000 + b"\r\n\r\n",
    "no path": b"GET * HTTP/1.1\r\nHost: x\r\n\r\n",
    "beginning of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "200,000 headers": POST + b"X-A: a\r\n" * 200_000 + b"\r\n",
    "line of 2 MB": b"POST /" + b"a" * 2_000_000 + b" HTTP/1.1\r\n\r\n",
    "no host": b"POST /segment HTTP/1.1\r\n\r\n",
    "HTTP/x": b"POST /segment HTTP/x\r\nHost: x\r\n\r\n",
    "negative length": POST + b"Content-Length: -5\r\n\r\n",
    "length and chunks": POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "header without a name": POST + b": a\r\n\r\n",
    "zero byte in a header": POST + b"X-A: \0\r\n\r\n",
    "broken chunk": POST + FORM + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "endless chunk size": POST + FORM + b"Transfer-Encoding: chunked\r\n\r\n" + b"1" * 100_000,
}


def exchange(address: tuple[str, int], sent: bytes) -> tuple[int, bytes, bytes]:
    """Status, head and body of what is answered until the service hangs up."""
    with socket.create_connection(address, timeout=TIMEOUT_S) as connection:
        received = b""
        with contextlib.suppress(ConnectionError):  # it hangs up on those who go on sending
            connection.sendall(sent)
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65_536):
                received += part
    head, _, body = received.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head.lower():
        body = body.split(b"\r\n")[1]
    return int(head.split()[1]), head, body


def address_of(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port
