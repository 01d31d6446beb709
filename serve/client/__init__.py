"""Clients with one `segment()`: over HTTP to the service, over gRPC to a Triton server."""

from serve.client.clients import (
    AsyncHttpClient,
    AsyncTritonClient,
    HttpClient,
    TritonClient,
)

__all__ = ["AsyncHttpClient", "AsyncTritonClient", "HttpClient", "TritonClient"]
