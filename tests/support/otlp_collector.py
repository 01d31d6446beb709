"""A collector of traces (OTLP over HTTP) on a free port of 127.0.0.1, for tests."""

import gzip
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class CollectedSpan:
    """A span as it was sent; ids in hexadecimal."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_span_id: str
    attributes: dict[str, object]


class Collector:
    """The spans that were sent."""

    def __init__(self) -> None:
        self.url = ""
        self._spans: list[CollectedSpan] = []
        self._arrived = threading.Condition()

    def add(self, spans: list[CollectedSpan]) -> None:
        """Take one export."""
        with self._arrived:
            self._spans.extend(spans)
            self._arrived.notify_all()

    def wait_for(self, service: str, name: str, trace_id: str | None = None) -> CollectedSpan:
        """The first span of the name, in that trace, that a service sends."""
        deadline = time.monotonic() + _TIMEOUT_S
        with self._arrived:
            while True:
                for span in self._spans:
                    is_wanted = trace_id in (None, span.trace_id)
                    if (span.service, span.name) == (service, name) and is_wanted:
                        return span
                found = sorted({(s.service, s.name, s.trace_id) for s in self._spans})
                assert self._arrived.wait(deadline - time.monotonic()), found


@contextmanager
def running_collector() -> Iterator[Collector]:
    """Start a collector, and stop it at the end."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            is_json = "json" in self.headers["Content-Type"]
            collector.add(_from_json(body) if is_json else _from_protobuf(body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector.url = f"http://127.0.0.1:{server.server_port}/v1/traces"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _from_protobuf(body: bytes) -> list[CollectedSpan]:
    """As OpenTelemetry's Python exporter sends it."""
    return [
        CollectedSpan(
            service=_service({a.key: a.value.string_value for a in resource.resource.attributes}),
            name=span.name,
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_span_id=span.parent_span_id.hex(),
            attributes={
                a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes
            },
        )
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _from_json(body: bytes) -> list[CollectedSpan]:
    """As Triton sends it."""
    return [
        CollectedSpan(
            service=_service(
                {
                    a["key"]: a["value"].get("stringValue", "")
                    for a in resource["resource"]["attributes"]
                }
            ),
            name=span["name"],
            trace_id=span["traceId"].lower(),
            span_id=span["spanId"].lower(),
            parent_span_id=span.get("parentSpanId", "").lower(),
            attributes={},
        )
        for resource in json.loads(body)["resourceSpans"]
        for scope in resource["scopeSpans"]
        for span in scope["spans"]
    ]


def _service(resource: dict[str, str]) -> str:
    return resource.get("service.name", "")
