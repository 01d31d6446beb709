import asyncio
import json
import logging
import warnings
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from serve.contract.errors import BusyError, TookTooLongError
from serve.service.error_answers import EXCEPTION_HANDLERS
from serve.service.gateway import build_gateway
from serve.service.logs import JsonFormatter, TextFormatter, configure_logging, current_request
from serve.service.telemetry import Telemetry
from serve.service.work_queue import WorkQueue
from serve.settings import ServeSettings
from tests.support.errors import refusal_of

NO_SECONDS = 0.001


class Endpoints:
    """What stands behind the gateway in these tests."""

    def __init__(self) -> None:
        self.telemetry = Telemetry()
        self.released = asyncio.Event()

    async def id_seen(self, _: Request) -> Response:
        record = current_request()
        assert record is not None
        return PlainTextResponse(record.request_id)

    async def slow(self, _: Request) -> Response:
        await self.released.wait()
        return PlainTextResponse("done")

    async def read(self, request: Request) -> Response:
        await request.body()
        return await self.slow(request)

    async def stream(self, _: Request) -> Response:
        async def parts() -> object:
            yield b"first "
            await asyncio.sleep(20 * NO_SECONDS)
            yield b"last"

        return StreamingResponse(parts())

    async def staged(self, _: Request) -> Response:
        with self.telemetry.stage("decode"):
            return PlainTextResponse("decoded")

    async def broken(self, _: Request) -> Response:
        raise RuntimeError("ours")

    async def metrics(self, _: Request) -> Response:
        return PlainTextResponse(self.telemetry.render())

    def app(self, **settings: object) -> Starlette:
        async def failed(_: Request, __: Exception) -> Response:
            return JSONResponse({"error": "ours"}, 500)

        routes = [
            Route(f"/{name}", getattr(self, name), methods=["GET", "POST"])
            for name in ("id_seen", "slow", "read", "stream", "staged", "broken", "metrics")
        ]
        handlers = EXCEPTION_HANDLERS | {Exception: failed}
        inner = Starlette(routes=routes, exception_handlers=handlers)
        inner.state.telemetry = self.telemetry
        inner.state.worker = SimpleNamespace(queue=WorkQueue(1, 1024))
        return build_gateway(inner, ServeSettings(**settings))  # type: ignore[arg-type]


def _run(
    work: Callable[[httpx.AsyncClient, Endpoints], object], **settings: object
) -> httpx.Response:
    async def main() -> httpx.Response:
        endpoints = Endpoints()
        transport = httpx.ASGITransport(endpoints.app(**settings), raise_app_exceptions=False)
        async with AsyncExitStack() as stack:
            client = httpx.AsyncClient(transport=transport, base_url="http://test")
            await stack.enter_async_context(client)
            return await work(client, endpoints)  # type: ignore[misc, no-any-return]

    return asyncio.run(main())


@pytest.fixture
def access_log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[dict[str, object]]]:
    """The log of requests, as it is written within them."""
    caplog.set_level(logging.INFO, "serve.access_log")
    caplog.handler.setFormatter(JsonFormatter())

    def entries() -> list[dict[str, object]]:
        found = [json.loads(line) for line in caplog.text.splitlines()]
        return [entry for entry in found if entry["logger"] == "serve.access_log"]

    return entries


@pytest.mark.parametrize("given", ["run-7:a.b", "", "a b", "x" * 65, '"},{"', "\xe9"])
def test_a_sane_request_id_is_kept_and_any_other_replaced(given: str) -> None:
    headers = {"X-Request-ID": given.encode("latin-1")}
    response = _run(lambda client, _: client.get("/id_seen", headers=headers))
    assert response.text == "run-7:a.b" if given == "run-7:a.b" else len(response.text) == 32
    assert response.headers["X-Request-ID"] == response.text


def test_a_refused_request_has_an_id_too() -> None:
    assert "X-Request-ID" in _run(lambda client, _: client.get("/nowhere")).headers


def test_beyond_the_limit_a_request_is_a_429_and_reading_is_not() -> None:
    async def work(client: httpx.AsyncClient, endpoints: Endpoints) -> httpx.Response:
        first = asyncio.create_task(client.post("/slow"))
        while "in_progress 2.0" not in (await client.get("/metrics")).text:  # itself and the other
            await asyncio.sleep(0)
        refused = await client.post("/id_seen")
        assert (await client.get("/id_seen")).status_code == 200
        endpoints.released.set()
        assert (await first).text == "done"
        assert (await client.post("/id_seen")).status_code == 200
        return refused

    refused = _run(work, max_waiting=1)
    assert refused.status_code == 429
    assert refused.headers["Retry-After"] == "1"
    assert refused.json()["code"] == BusyError.code


class _Upload:
    """A request to /read whose body arrives when the test says so."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.messages: asyncio.Queue[dict[str, object]] = asyncio.Queue()
        self.messages.put_nowait({"type": "http.request", "body": b"a", "more_body": True})
        self.sent: list[dict[str, object]] = []
        scope = {"type": "http", "method": "POST", "path": "/read", "query_string": b""}
        scope |= {"headers": [(b"content-length", b"2")], "root_path": "", "client": None}
        app = client._transport.app  # type: ignore[attr-defined]
        self.done = asyncio.create_task(
            app(scope | {"scheme": "http"}, self.messages.get, self._send)
        )

    async def _send(self, message: dict[str, object]) -> None:
        self.sent.append(message)

    def finish(self) -> None:
        self.messages.put_nowait({"type": "http.request", "body": b"b"})

    def leave(self) -> None:
        self.messages.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> object:
        return self.sent[0]["status"]


def test_slow_uploads_take_no_place_of_requests_that_are_ready() -> None:
    async def work(client: httpx.AsyncClient, endpoints: Endpoints) -> httpx.Response:
        uploads = [_Upload(client) for _ in range(80)]
        await asyncio.sleep(0)
        ready = await client.post("/id_seen", content=b"there")
        first, second, *others = uploads
        first.finish()
        second.finish()
        await second.done  # the other has the only place now
        assert second.status == 429
        endpoints.released.set()
        await first.done
        assert first.status == 200
        others[0].finish()
        await others[0].done
        assert others[0].status == 200
        for upload in others:
            upload.finish()
        await asyncio.gather(*(upload.done for upload in others))
        return ready

    assert _run(work, max_waiting=1).status_code == 200


def test_how_many_upload_at_the_same_time_is_bounded() -> None:
    async def work(client: httpx.AsyncClient, endpoints: Endpoints) -> httpx.Response:
        endpoints.released.set()
        uploads = [_Upload(client) for _ in range(3)]
        await asyncio.sleep(0)
        refused = await client.post("/id_seen", content=b"there")
        for upload in uploads:
            upload.finish()
        await asyncio.gather(*(upload.done for upload in uploads))
        assert (await client.post("/id_seen", content=b"there")).status_code == 200
        return refused

    refused = _run(work, max_uploads=3)
    assert (refused.status_code, refused.json()["code"]) == (429, BusyError.code)


def test_a_request_that_takes_too_long_is_a_504_and_leaves_its_place_to_others() -> None:
    async def work(client: httpx.AsyncClient, _: Endpoints) -> httpx.Response:
        slow = await client.post("/slow")
        assert refusal_of(slow, "0.001 s") == (504, TookTooLongError.code)
        return await client.post("/id_seen")

    assert _run(work, request_timeout_s=NO_SECONDS, max_waiting=1).status_code == 200


def test_a_caller_who_has_left_is_a_499_and_leaves_its_place_to_others(
    access_log: Callable[[], list[dict[str, object]]],
) -> None:
    async def work(client: httpx.AsyncClient, _: Endpoints) -> httpx.Response:
        upload = _Upload(client)
        upload.finish()
        while not upload.messages.empty():
            await asyncio.sleep(0)
        upload.leave()
        await upload.done
        assert upload.sent == []
        return await client.post("/id_seen")

    assert _run(work, max_waiting=1).status_code == 200
    entry, _ = access_log()
    assert (entry["path"], entry["status"]) == ("/read", 499)


def test_an_answer_that_has_begun_is_finished() -> None:
    response = _run(lambda client, _: client.post("/stream"), request_timeout_s=NO_SECONDS)
    assert response.text == "first last"


def test_a_service_under_a_path_takes_requests_with_and_without_it() -> None:
    async def work(client: httpx.AsyncClient, _: Endpoints) -> httpx.Response:
        for path in ("/focalpath/id_seen", "/id_seen"):  # the proxy keeps it, or strips it
            assert (await client.get(path)).status_code == 200
        assert (await client.get("/focalpathology/id_seen")).status_code == 404
        page = await client.get("/focalpath")
        assert (page.status_code, page.headers["Location"]) == (308, "/focalpath/")
        return await client.get("/focalpath/metrics")

    metrics = _run(work, root_path="/focalpath").text
    assert 'focalpath_requests_total{endpoint="/id_seen",status="200"} 2.0' in metrics


def test_a_foreign_origin_is_allowed_when_it_is_listed() -> None:
    headers = {"Origin": "https://dsa.example", "Access-Control-Request-Method": "POST"}
    headers["Access-Control-Request-Headers"] = "x-api-key"
    response = _run(
        lambda client, _: client.options("/id_seen", headers=headers),
        allowed_origins=("https://dsa.example",),
    )
    assert response.headers["Access-Control-Allow-Origin"] == "https://dsa.example"
    assert "X-API-Key" in response.headers["Access-Control-Allow-Headers"]


@pytest.mark.parametrize("origins", [(), ("https://dsa.example",)])
def test_any_other_origin_is_not_allowed(origins: tuple[str, ...]) -> None:
    response = _run(
        lambda client, _: client.get("/id_seen", headers={"Origin": "https://evil.example"}),
        allowed_origins=origins,
    )
    assert "Access-Control-Allow-Origin" not in response.headers


def test_a_browser_asks_for_its_origin_without_a_key_and_sees_why_a_key_is_refused(
    tmp_path: Path,
) -> None:
    (tmp_path / "keys").write_text("alice:0123456789abcdef")

    async def work(client: httpx.AsyncClient, _: Endpoints) -> httpx.Response:
        origin = {"Origin": "https://dsa.example"}
        asked = {**origin, "Access-Control-Request-Method": "POST"}
        assert (await client.options("/id_seen", headers=asked)).status_code == 200
        return await client.post("/id_seen", headers=origin)

    keys = {"api_keys_file": tmp_path / "keys"}
    refused = _run(work, allowed_origins=("https://dsa.example",), **keys)
    assert refused.status_code == 401
    assert refused.headers["Access-Control-Allow-Origin"] == "https://dsa.example"
    exposed = refused.headers["Access-Control-Expose-Headers"]
    assert {"Retry-After", "X-Request-ID"} <= set(exposed.split(", "))


def test_requests_are_counted_by_endpoint_status_and_reason(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("alice:0123456789abcdef")

    async def work(client: httpx.AsyncClient, _: Endpoints) -> httpx.Response:
        await client.post("/id_seen")
        key = {"X-API-Key": "0123456789abcdef"}
        await client.post("/id_seen", headers=key)
        await client.post("/made/up", headers=key)
        await client.post("/broken", headers=key)
        return await client.get("/metrics")

    metrics = _run(work, api_keys_file=tmp_path / "keys").text
    for line in (
        'focalpath_requests_total{endpoint="/id_seen",status="401"} 1.0',
        'focalpath_requests_total{endpoint="/id_seen",status="200"} 1.0',
        'focalpath_requests_total{endpoint="other",status="404"} 1.0',
        'focalpath_requests_total{endpoint="/broken",status="500"} 1.0',
        'focalpath_rejections_total{reason="no_key"} 1.0',
        'focalpath_rejections_total{reason="error"} 1.0',
        'focalpath_request_seconds_count{endpoint="/id_seen"} 2.0',
    ):
        assert line in metrics.splitlines()
    assert "/made/up" not in metrics


def test_an_answer_is_a_line_of_the_log_with_the_keys_name_and_never_the_key(
    tmp_path: Path, access_log: Callable[[], list[dict[str, object]]]
) -> None:
    (tmp_path / "keys").write_text("alice:0123456789abcdef")
    headers = {"X-API-Key": "0123456789abcdef", "X-Request-ID": "run-7"}
    _run(
        lambda client, _: client.post("/staged", headers=headers),
        api_keys_file=tmp_path / "keys",
    )
    (entry,) = access_log()
    assert (entry["key"], entry["request_id"]) == ("alice", "run-7")
    assert (entry["method"], entry["path"], entry["status"]) == ("POST", "/staged", 200)
    assert {"duration_ms", "decode_ms", "client"} < set(entry)
    assert "0123456789abcdef" not in json.dumps(entry)


def test_an_error_in_the_log_is_one_line_with_its_traceback() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
        record = logging.LogRecord("serve", logging.ERROR, __file__, 1, "it\nfailed", (), info)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert "ValueError: two\nlines" in json.loads(line)["exception"]


def test_the_log_as_text_has_the_fields_behind_the_message() -> None:
    record = logging.LogRecord("serve", logging.INFO, __file__, 1, "answered", (), None)
    record.fields = {"status": 200}
    assert TextFormatter("%(message)s").format(record) == "answered status=200"


def test_a_warning_is_a_line_of_the_log_and_pillows_are_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = logging.root.handlers[:]
    logging.captureWarnings(False)  # a test before may have left it on, which makes it do nothing
    with warnings.catch_warnings():
        try:
            warnings.simplefilter("default")
            configure_logging("json")
            warnings.warn_explicit("odd TIFF", UserWarning, "x.py", 1, module="PIL.TiffImagePlugin")
            warnings.warn_explicit("ours", UserWarning, "x.py", 1, module="serve")
        finally:
            logging.captureWarnings(False)
            logging.root.handlers[:] = before
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["logger"] for line in lines] == ["py.warnings"]
    assert "ours" in lines[0]["message"]
