"""Clients with one `segment()`: over HTTP to the service, over gRPC to a Triton server."""

from serve.client.http import AsyncHttpClient, HttpClient
from serve.client.triton import AsyncTritonClient, TritonClient

__all__ = ["AsyncHttpClient", "AsyncTritonClient", "HttpClient", "TritonClient"]
