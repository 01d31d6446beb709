"""These fail when BentoML or uvicorn no longer do what `bentoml_patches` replaces."""

import inspect
import logging.config
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from _bentoml_impl.worker import service as bentoml_worker
from bentoml._internal import log as bentoml_log
from bentoml._internal.server.base_app import BaseAppFactory
from bentoml._internal.server.http import traffic
from starlette.middleware import Middleware

from serve.service import bentoml_patches
from serve.service.protocol import ServiceProtocol


@pytest.fixture
def _patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches of this test alone."""
    for names in (uvicorn.config.HTTP_PROTOCOLS, uvicorn.config.WS_PROTOCOLS):
        monkeypatch.setitem(names, "auto", names["auto"])  # type: ignore[arg-type]
    monkeypatch.setattr(traffic, "TimeoutMiddleware", traffic.TimeoutMiddleware)
    monkeypatch.setattr(bentoml_log, "configure_logging", bentoml_log.configure_logging)
    bentoml_patches.apply_patches()


@pytest.mark.usefixtures("_patched")
def test_uvicorn_as_bentoml_starts_it_speaks_our_protocol_and_no_websockets() -> None:
    assert "http=" not in inspect.getsource(bentoml_worker), "BentoML lets one choose now"
    config = uvicorn.Config(_app, log_config=None)
    config.load()
    assert config.http_protocol_class is ServiceProtocol
    assert config.ws_protocol_class is None


async def _app(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("not called")


def _bentomls_timeout() -> Middleware:
    """What BentoML puts around its application for a timeout."""
    settings = SimpleNamespace(timeout=1, max_concurrency=None)
    (middleware,) = BaseAppFactory.middlewares.fget(settings)  # type: ignore[attr-defined]
    return middleware  # type: ignore[no-any-return]


def test_bentoml_looks_up_its_timeout_by_the_name_that_is_replaced() -> None:
    assert _bentomls_timeout().cls is traffic.TimeoutMiddleware


@pytest.mark.usefixtures("_patched")
def test_bentomls_timeout_is_replaced_by_nothing() -> None:
    middleware = _bentomls_timeout()
    assert middleware.cls(_app, *middleware.args, **middleware.kwargs) is _app


def test_bentoml_sets_up_a_log_of_its_own_by_this_name(monkeypatch: pytest.MonkeyPatch) -> None:
    configured: list[object] = []
    monkeypatch.setattr(logging.config, "dictConfig", configured.append)
    bentoml_log.configure_logging()
    assert configured


@pytest.mark.usefixtures("_patched")
def test_bentomls_log_is_replaced_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    configured: list[object] = []
    monkeypatch.setattr(logging.config, "dictConfig", configured.append)
    bentoml_log.configure_logging()
    assert not configured


@pytest.mark.slow
def test_nothing_of_a_request_is_kept_when_it_has_been_answered(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the real service with all that BentoML puts around the endpoints."""
    code = """
import asyncio
import httpx
from serve.service.server import SegmentationService

async def main():
    transport = httpx.ASGITransport(SegmentationService.to_asgi())
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for _ in range(200):
            assert (await client.get("/livez")).status_code == 200
    scheduled = asyncio.get_running_loop()._scheduled
    print(sum(not timer.cancelled() for timer in scheduled))

asyncio.run(main())
"""
    monkeypatch.setenv("FOCALPATH_BUNDLE", str(toy_bundle))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout.split()[-1]) < 10
