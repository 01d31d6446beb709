import asyncio
import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import httpx
import numpy as np
import pytest
from PIL import Image

from serve.client import AsyncHttpClient, HttpClient
from serve.client.calls import check_answer
from serve.contract.errors import (
    BackendUnavailableError,
    FocalPathError,
    ImageError,
    ImageTooLargeError,
    ModelChangedError,
    OptionError,
    SettingsError,
)
from serve.contract.manifest import Manifest, read_bundle
from serve.inference.segmenter import Segmentation, TileSegmenter, open_segmenter
from serve.settings import ServeSettings
from tests.support.errors import raises
from tests.support.pictures import blobs
from tests.support.ports import free_port

POLL_S = 0.01
"""Between looks of a server of the tests for its end; half a second by default."""


@pytest.fixture(scope="module")
def client(service_url: str) -> Iterator[HttpClient]:
    with HttpClient(service_url) as client:
        yield client


@pytest.fixture(scope="module")
def segmenter(toy_bundle: Path) -> Iterator[TileSegmenter]:
    with open_segmenter(ServeSettings(bundle=toy_bundle)) as segmenter:
        yield segmenter


@pytest.mark.parametrize("size", [(64, 64), (10, 20), (150, 333)])
def test_http_gives_what_the_segmenter_gives_in_process(
    size: tuple[int, int], client: HttpClient, segmenter: TileSegmenter
) -> None:
    image = blobs(*size)
    here, there = segmenter.segment(image), client.segment(image)
    assert there.labels.dtype == there.confidence.dtype == np.uint8
    assert np.array_equal(there.labels, here.labels)
    assert np.array_equal(there.confidence, here.confidence)
    assert there.summary == here.summary


@pytest.mark.parametrize("size", [(64, 64), (150, 333)])
def test_http_gives_the_same_for_another_mpp_with_probabilities(
    size: tuple[int, int], client: HttpClient, segmenter: TileSegmenter
) -> None:
    image = blobs(*size)
    here = segmenter.segment(image, mpp=0.7, mpp_source="OME-XML", with_probabilities=True)
    there = client.segment(image, mpp=0.7, mpp_source="OME-XML", with_probabilities=True)
    assert np.array_equal(there.labels, here.labels)
    assert there.summary == here.summary
    assert here.low_res is not None
    assert there.low_res is not None
    assert np.array_equal(there.low_res.probabilities, here.low_res.probabilities)
    assert there.low_res.stride_px == here.low_res.stride_px
    assert there.low_res.origin_px == here.low_res.origin_px


def test_the_async_client_gives_each_of_many_the_same_as_the_other(
    service_url: str, client: HttpClient
) -> None:
    images = [blobs(80, 70 + index, seed=index) for index in range(6)]

    async def segment_all() -> list[Segmentation]:
        async with AsyncHttpClient(service_url) as asynchronous:
            assert await asynchronous.manifest() == client.manifest
            return await asyncio.gather(*(asynchronous.segment(image) for image in images))

    for image, result in zip(images, asyncio.run(segment_all()), strict=True):
        assert np.array_equal(result.labels, client.segment(image).labels)


def test_the_async_client_says_what_the_service_refuses(service_url: str) -> None:
    async def segment() -> None:
        async with AsyncHttpClient(service_url) as asynchronous:
            await asynchronous.segment(np.zeros((1000, 1001, 3), np.uint8))

    with raises(ImageTooLargeError, 1001, 1000):
        asyncio.run(segment())


def test_an_absurd_mpp_is_the_same_error_everywhere(
    client: HttpClient, segmenter: TileSegmenter
) -> None:
    for one in (client, segmenter):
        with raises(OptionError, "mpp", 1000):
            one.segment(blobs(20, 20), mpp=1000)


def test_an_api_key_is_sent_with_every_request() -> None:
    seen: list[str | None] = []

    class Keys(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("X-API-Key"))
            self.send_error(401)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Keys) as server:
        thread = Thread(target=server.serve_forever, args=(POLL_S,))
        thread.start()
        with (
            HttpClient(f"http://127.0.0.1:{server.server_port}", api_key="s3cret") as client,
            raises(BackendUnavailableError, 401),
        ):
            _ = client.manifest
        server.shutdown()
        thread.join()
    assert seen == ["s3cret"]


def test_the_http_client_knows_the_model(client: HttpClient, toy_bundle: Path) -> None:
    assert client.manifest == read_bundle(toy_bundle)


def test_an_image_over_the_services_limit_is_refused_by_its_message(client: HttpClient) -> None:
    with raises(ImageTooLargeError, 1001, 1000, 1_001_000):
        client.segment(np.zeros((1000, 1001, 3), np.uint8))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_an_array_of_another_kind_is_refused(
    image: np.ndarray, client: HttpClient, segmenter: TileSegmenter
) -> None:
    for one in (client, segmenter):
        with raises(ImageError, image.shape, image.dtype):
            one.segment(image)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clients would have waited."""
    found: list[float] = []

    async def note(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr("serve.client.http.time.sleep", found.append)
    monkeypatch.setattr("serve.client.http.asyncio.sleep", note)
    return found


class _Refusing(HTTPServer):
    """A service that refuses the first requests, and then has a model."""

    def __init__(self, *statuses: int, manifest: bytes, retry_after: str = "1") -> None:
        self.left = list(statuses)

        class Answer(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                status = self.left.pop(0) if self.left else 200
                handler.send_response(status)
                handler.send_header("Retry-After", retry_after)
                handler.end_headers()
                handler.wfile.write(manifest if status == 200 else b'{"error": "not now"}')

            def log_message(handler, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Answer)

    @contextmanager
    def at(self) -> Iterator[str]:
        with self:
            thread = Thread(target=self.serve_forever, args=(POLL_S,))
            thread.start()
            yield f"http://127.0.0.1:{self.server_port}"
            self.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "kind", "hint"),
    [
        (413, ImageTooLargeError, "client_max_body_size"),
        (502, BackendUnavailableError, "proxy"),
        (504, BackendUnavailableError, "proxy_read_timeout"),
    ],
)
def test_an_answer_of_a_proxy_is_told_as_one(
    status: int, kind: type[FocalPathError], hint: str, pauses: list[float]
) -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(status, html="<h1>nginx</h1>")

    with HttpClient("http://proxy.example") as client:
        client._client = httpx.Client(transport=httpx.MockTransport(answer))
        with pytest.raises(kind) as raised:
            client.segment(np.zeros((4, 4, 3), np.uint8))
    assert str(status) in str(raised.value)
    assert hint in str(raised.value)


@pytest.mark.parametrize("given", ["path", "bytes"])
def test_a_file_is_sent_as_its_own_bytes_and_not_as_a_png(given: str, tmp_path: Path) -> None:
    path = tmp_path / "tile.jpg"
    Image.fromarray(blobs(64, 64)).save(path, quality=60)
    sent: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(400, json={"error": "seen"})

    with HttpClient("http://service.example") as client:
        client._client = httpx.Client(transport=httpx.MockTransport(answer))
        with pytest.raises(ImageError):
            client.segment(path if given == "path" else path.read_bytes())
    (request,) = sent
    body, boundary = request.read(), request.headers["content-type"].partition("boundary=")[2]
    content = body.partition(b"\r\n\r\n")[2].removesuffix(f"\r\n--{boundary}--\r\n".encode())
    assert hashlib.sha256(content).digest() == hashlib.sha256(path.read_bytes()).digest()
    assert "mpp" not in request.url.params


def test_a_file_gives_what_the_service_reads_in_it(client: HttpClient, tmp_path: Path) -> None:
    path = tmp_path / "tile.jpg"
    Image.fromarray(blobs(64, 64)).save(path, quality=60)
    with Image.open(path) as decoded:
        expected = client.segment(np.asarray(decoded.convert("RGB")))
    assert np.array_equal(client.segment(path).labels, expected.labels)


def test_a_file_that_is_not_there_is_named(client: HttpClient, tmp_path: Path) -> None:
    with raises(ImageError, tmp_path / "none.jpg"):
        client.segment(tmp_path / "none.jpg")


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_busy_service_is_asked_again_when_it_says(
    kind: str, toy_bundle: Path, pauses: list[float]
) -> None:
    manifest = read_bundle(toy_bundle)

    async def ask(url: str) -> Manifest:
        async with AsyncHttpClient(url) as client:
            return await client.manifest()

    service = _Refusing(
        429, 503, 429, manifest=manifest.model_dump_json().encode(), retry_after="7"
    )
    with service.at() as url:
        if kind == "async":
            assert asyncio.run(ask(url)) == manifest
        else:
            with HttpClient(url) as client:
                assert client.manifest == manifest
    assert pauses == [7, 7, 7]


@pytest.mark.parametrize(
    ("status", "retry_after", "patience_s", "expected"),
    [
        (503, "Fri, 31 Dec 1999 23:59:59 GMT", 120, [1, 2, 4]),  # a few times only
        (429, "3600", 120, []),  # longer than we have
        (429, "1", 0, []),
        (401, "1", 120, []),
    ],
)
def test_a_client_gives_up_in_time(
    status: int, retry_after: str, patience_s: float, expected: list[float], pauses: list[float]
) -> None:
    service = _Refusing(*[status] * 9, manifest=b"", retry_after=retry_after)
    with (
        service.at() as url,
        HttpClient(url, patience_s=patience_s) as client,
        raises(BackendUnavailableError, "not now"),
    ):
        _ = client.manifest
    assert pauses == expected


def _losing(num_lost: int, error: type[httpx.TransportError]) -> httpx.MockTransport:
    """A service whose worker is lost with the first requests."""
    lost = iter(range(num_lost))

    def answer(request: httpx.Request) -> httpx.Response:
        if next(lost, None) is not None:
            raise error("gone", request=request)
        return httpx.Response(401, json={"error": "asked again"})

    return httpx.MockTransport(answer)


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize(
    ("num_lost", "error", "expected", "message"),
    [
        (1, httpx.ReadError, [1], "asked again"),
        (3, httpx.ConnectError, [1, 2, 4], "asked again"),
        (2, httpx.RemoteProtocolError, [1, 2], "asked again"),
        (9, httpx.WriteError, [1, 2, 4], "gone"),  # a few times only
        (1, httpx.ReadTimeout, [], "gone"),  # it would be as slow again
    ],
)
def test_a_lost_worker_is_asked_again(
    kind: str,
    num_lost: int,
    error: type[httpx.TransportError],
    expected: list[float],
    message: str,
    pauses: list[float],
) -> None:
    transport = _losing(num_lost, error)

    def synchronous() -> None:
        with HttpClient("http://service.example") as client:
            client._client = httpx.Client(transport=transport)
            client._has_answered = True
            client.segment(blobs(4, 4))

    async def asynchronous() -> None:
        async with AsyncHttpClient("http://service.example") as client:
            client._client = httpx.AsyncClient(transport=transport)
            client._has_answered = True
            await client.segment(blobs(4, 4))

    with raises(BackendUnavailableError, message):
        synchronous() if kind == "sync" else asyncio.run(asynchronous())
    assert pauses == expected


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_service_that_is_not_there_is_named(kind: str) -> None:
    url = f"http://127.0.0.1:{free_port()}"

    async def segment() -> None:
        async with AsyncHttpClient(url) as client:
            await client.segment(blobs(4, 4))

    with HttpClient(url) as client, raises(BackendUnavailableError, url, "python -m serve http"):
        asyncio.run(segment()) if kind == "async" else client.segment(blobs(4, 4))


def test_a_service_that_is_too_slow_is_not_taken_for_one_that_is_not_there() -> None:
    transport = _losing(1, httpx.ReadTimeout)
    with HttpClient("http://service.example") as client:
        client._client = httpx.Client(transport=transport)
        with raises(BackendUnavailableError, "http://service.example") as slow:
            client.segment(blobs(4, 4))
    assert "python -m serve http" not in str(slow.value)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "option_invalid", ImageError),
        (413, "too_many_tiles", ImageTooLargeError),
        (401, "key_refused", BackendUnavailableError),
        (504, "took_too_long", BackendUnavailableError),
    ],
)
def test_an_error_keeps_the_code_of_the_service(
    status: int, code: str, kind: type[FocalPathError]
) -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(status, json={"error": "told", "code": code})

    with HttpClient("http://service.example") as client:
        client._client = httpx.Client(transport=httpx.MockTransport(answer))
        with raises(kind, "told", code=code):
            client.segment(blobs(4, 4))


@pytest.mark.parametrize("url", ["127.0.0.1:3000", "ftp://host", ""])
def test_an_address_that_is_no_url_is_refused(url: str) -> None:
    for kind in (HttpClient, AsyncHttpClient):
        with raises(BackendUnavailableError, repr(url), "http://host:port"):
            kind(url)


@pytest.fixture
def stranger() -> Iterator[str]:
    """A web server that answers everything with a page of its own."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = Thread(target=server.serve_forever, args=(POLL_S,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_another_web_server_is_told_from_the_service(stranger: str) -> None:
    with HttpClient(stranger) as client:
        with raises(BackendUnavailableError, f"{stranger}/model"):
            _ = client.manifest
        with raises(BackendUnavailableError, f"{stranger}/arrays"):
            client.segment(blobs(4, 4))


def answered(**changes: object) -> bytes:
    """What the service answers for an image of 4 x 6 pixels, with other arrays."""
    labels = np.ones((4, 6), np.uint8)
    entry = {"pixel_count": 24, "pixel_share": 1, "area_um2": None, "mean_confidence": 1}
    entry |= {"low_confidence_share": 0, "predicted_iou": None}
    summary = {
        "model": {"name": "m", "version": "1"},
        "image": {"width_px": 6, "height_px": 4, "mpp": 0.5, "mpp_source": "request"},
        "classes": [{"name": "A", "color": "#ffffff", "label": 1, **entry}],
        "low_confidence_share": 0,
    }
    arrays: dict[str, object] = {"labels": labels, "confidence": labels}
    arrays |= {"summary": np.frombuffer(json.dumps(summary).encode(), np.uint8), **changes}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


ONES = np.ones((4, 6), np.uint8)
PLACES = {"origin_px": np.zeros(2), "stride_px": np.ones(2)}
SINGLE = io.BytesIO()
np.save(SINGLE, ONES)


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, html="<h1>Log in</h1>"),
        httpx.Response(200),
        httpx.Response(200, content=SINGLE.getvalue()),
        httpx.Response(200, content=answered()[:-30]),
        httpx.Response(200, content=answered()[:60] + b"\xff" * 40 + answered()[100:]),
        httpx.Response(200, content=answered(labels=ONES[:3])),
        httpx.Response(200, content=answered(labels=ONES.astype(np.float32))),
        httpx.Response(200, content=answered(labels=ONES * 2)),
        httpx.Response(200, content=answered(confidence=ONES[:, :5])),
        httpx.Response(200, content=answered(probabilities=np.ones((2, 1, 1), np.uint8), **PLACES)),
        httpx.Response(200, content=answered(probabilities=np.ones(3, np.uint8), **PLACES)),
        httpx.Response(302, headers={"Location": "https://login.example"}),
        httpx.Response(500, json={"error": None}),
        httpx.Response(500, json=["error"]),
    ],
    ids=range(14),
)
def test_an_answer_of_something_else_is_one_clear_error(
    answer: httpx.Response, pauses: list[float]
) -> None:
    with HttpClient("http://service.example", patience_s=0) as client:
        client._client = httpx.Client(transport=httpx.MockTransport(lambda _: answer))
        with pytest.raises(BackendUnavailableError, match=r"http://service\.example") as raised:
            client.segment(np.zeros((4, 6, 3), np.uint8))
    assert answer.headers.get("Location", "") in str(raised.value)


def test_an_answer_for_another_image_or_model_is_refused(toy_bundle: Path) -> None:
    answer = httpx.Response(200, content=answered())
    with HttpClient("http://service.example") as client:
        client._client = httpx.Client(transport=httpx.MockTransport(lambda _: answer))
        with raises(BackendUnavailableError, (4, 6), (6, 4)):
            client.segment(np.zeros((6, 4, 3), np.uint8))
        found = client.segment(np.zeros((4, 6, 3), np.uint8))
    manifest = read_bundle(toy_bundle)
    with raises(ModelChangedError, "m 1", manifest.name):
        check_answer(found, (4, 6), manifest)
    same = manifest.model_copy(update={"name": "m", "version": "1"})
    check_answer(found, (4, 6), same)
    with raises(BackendUnavailableError, "6 x 4", "4 x 6"):
        check_answer(found, (6, 4), same)


def test_content_that_cannot_be_unpacked_is_one_clear_error() -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=Plain())

    class Plain(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield b"not compressed"

    with HttpClient("http://service.example") as client:
        client._client = httpx.Client(transport=httpx.MockTransport(answer))
        with raises(BackendUnavailableError, "unpacked"):
            client.segment(np.zeros((4, 6, 3), np.uint8))


@pytest.mark.parametrize("key", ["schlüssel-0123456789", "0123456789abcdef\n"])
def test_a_key_that_is_none_is_refused(key: str) -> None:
    with raises(SettingsError):
        HttpClient("http://service.example", api_key=key)
