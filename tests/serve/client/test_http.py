import asyncio
import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

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
from serve.contract.manifest import read_bundle
from serve.contract.proxies import spare_loopback
from serve.inference.segmenter import Segmentation, TileSegmenter, open_segmenter
from serve.settings import ServeSettings
from tests.support.errors import raises
from tests.support.pictures import blobs
from tests.support.ports import free_port

URL = "http://service.example"
TINY = np.zeros((4, 6, 3), np.uint8)
Answer = Callable[[httpx.Request], httpx.Response]
both = pytest.mark.parametrize("kind", [HttpClient, AsyncHttpClient])


def segment(kind: type, url: str, image: Any = TINY, **options: Any) -> Segmentation:
    """Segment with a client of either kind."""

    async def awaited() -> Segmentation:
        async with AsyncHttpClient(url, **options) as client:
            return await client.segment(image)

    if kind is AsyncHttpClient:
        return asyncio.run(awaited())
    with HttpClient(url, **options) as client:
        return client.segment(image)


@pytest.fixture
def answered_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer | httpx.Response], None]:
    """Has a function, or always the same answer, answer the clients in place of a service."""

    def set_(answer: Answer | httpx.Response) -> None:
        fixed = answer if callable(answer) else lambda _: answer
        transport = httpx.MockTransport(fixed)
        for kind, own in ((HttpClient, httpx.Client), (AsyncHttpClient, httpx.AsyncClient)):
            monkeypatch.setattr(kind, "_transport", partial(own, transport=transport))

    return set_


@pytest.fixture(scope="module")
def client(service_url: str) -> Iterator[HttpClient]:
    with HttpClient(service_url) as client:
        yield client


@pytest.fixture(scope="module")
def segmenter(toy_bundle: Path) -> Iterator[TileSegmenter]:
    with open_segmenter(ServeSettings(bundle=toy_bundle)) as segmenter:
        yield segmenter


@pytest.mark.parametrize("size", [(64, 64), (10, 20), (150, 333)])
@pytest.mark.parametrize(
    "options", [{}, {"mpp": 0.7, "mpp_source": "OME-XML", "with_probabilities": True}]
)
def test_http_gives_what_the_segmenter_gives_in_process(
    size: tuple[int, int], options: Any, client: HttpClient, segmenter: TileSegmenter
) -> None:
    image = blobs(*size)
    here, there = segmenter.segment(image, **options), client.segment(image, **options)
    assert there.labels.dtype == there.confidence.dtype == np.uint8
    assert np.array_equal(there.labels, here.labels)
    assert np.array_equal(there.confidence, here.confidence)
    assert there.summary == here.summary
    assert (here.low_res is None) == (there.low_res is None) == (not options)
    if here.low_res is not None and there.low_res is not None:
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


@both
def test_an_image_over_the_services_limit_is_refused_by_its_message(
    kind: type, service_url: str
) -> None:
    with raises(ImageTooLargeError, 1001, 1000, 1_001_000):
        segment(kind, service_url, np.zeros((1000, 1001, 3), np.uint8))


def test_an_absurd_mpp_is_the_same_error_everywhere(
    client: HttpClient, segmenter: TileSegmenter
) -> None:
    for one in (client, segmenter):
        with raises(OptionError, "mpp", 1000):
            one.segment(blobs(20, 20), mpp=1000)


def test_the_http_client_knows_the_model(client: HttpClient, toy_bundle: Path) -> None:
    assert client.manifest == read_bundle(toy_bundle)


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


@pytest.mark.parametrize("given", [Path, Path.read_bytes])
def test_a_file_is_sent_as_its_own_bytes_and_not_as_a_png(
    given: Callable[[Path], object], tmp_path: Path, answered_by: Any
) -> None:
    path = tmp_path / "tile.jpg"
    Image.fromarray(blobs(64, 64)).save(path, quality=60)
    sent: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(400, json={"error": "seen"})

    answered_by(answer)
    with raises(ImageError, "seen"):
        segment(HttpClient, URL, given(path))
    body, boundary = sent[0].read(), sent[0].headers["content-type"].partition("boundary=")[2]
    content = body.partition(b"\r\n\r\n")[2].removesuffix(f"\r\n--{boundary}--\r\n".encode())
    assert content == path.read_bytes()
    assert "mpp" not in sent[0].url.params


def test_a_file_gives_what_the_service_reads_in_it(client: HttpClient, tmp_path: Path) -> None:
    path = tmp_path / "tile.jpg"
    Image.fromarray(blobs(64, 64)).save(path, quality=60)
    with Image.open(path) as decoded:
        expected = client.segment(np.asarray(decoded.convert("RGB")))
    assert np.array_equal(client.segment(path).labels, expected.labels)


def test_a_file_that_is_not_there_is_named(client: HttpClient, tmp_path: Path) -> None:
    with raises(ImageError, tmp_path / "none.jpg"):
        client.segment(tmp_path / "none.jpg")


def test_an_api_key_is_sent_with_every_request(answered_by: Any) -> None:
    answered_by(lambda request: httpx.Response(401, json={"error": request.headers["X-API-Key"]}))
    with raises(BackendUnavailableError, "s3cret"):
        segment(HttpClient, URL, api_key="s3cret")


@pytest.mark.parametrize("key", ["schlüssel-0123456789", "0123456789abcdef\n"])
def test_a_key_that_is_none_is_refused(key: str) -> None:
    with raises(SettingsError):
        HttpClient(URL, api_key=key)


@both
@pytest.mark.parametrize("url", ["127.0.0.1:3000", "ftp://host", ""])
def test_an_address_that_is_no_url_is_refused(kind: type, url: str) -> None:
    with raises(BackendUnavailableError, repr(url), "http://host:port"):
        kind(url)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clients would have waited."""
    found: list[float] = []

    async def note(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr("serve.client.http.time.sleep", found.append)
    monkeypatch.setattr("serve.client.http.asyncio.sleep", note)
    return found


@both
@pytest.mark.parametrize(
    ("outcomes", "retry_after", "patience_s", "expected", "message"),
    [
        ([429, 503, 429], "7", 120, [7, 7, 7], "asked again"),
        ([503] * 9, "Fri, 31 Dec 1999 23:59:59 GMT", 120, [1, 2, 4], "not now"),  # a few times
        ([429], "3600", 120, [], "not now"),  # longer than we have
        ([429], "1", 0, [], "not now"),
        ([401], "1", 120, [], "not now"),
        ([httpx.ReadError], "1", 120, [1], "asked again"),
        ([httpx.RemoteProtocolError] * 2, "1", 120, [1, 2], "asked again"),
        ([httpx.ReadError, *[httpx.ConnectError] * 2], "1", 120, [1, 2, 4], "asked again"),
        ([503, *[httpx.ConnectError] * 2], "1", 120, [1, 2, 4], "asked again"),
        ([httpx.WriteError] * 9, "1", 120, [1, 2, 4], "gone"),  # a few times only
        ([httpx.ConnectError], "1", 120, [], "gone.*python -m serve http"),  # it was never there
        ([httpx.ReadTimeout], "1", 120, [], "gone.*a smaller image"),  # it would be as slow again
    ],
)
def test_a_service_that_is_busy_or_lost_is_asked_again_and_given_up_in_time(
    kind: type,
    outcomes: list[int | type[httpx.TransportError]],
    retry_after: str,
    patience_s: float,
    expected: list[float],
    message: str,
    pauses: list[float],
    answered_by: Any,
) -> None:
    left = iter(outcomes)

    def answer(request: httpx.Request) -> httpx.Response:
        outcome = next(left, None)
        if outcome is None:
            return httpx.Response(400, json={"error": "asked again"})
        if not isinstance(outcome, int):
            raise outcome("gone", request=request)
        headers = {"Retry-After": retry_after}
        return httpx.Response(outcome, headers=headers, json={"error": "not now"})

    answered_by(answer)
    with pytest.raises(FocalPathError, match=message):
        segment(kind, URL, patience_s=patience_s)
    assert pauses == expected


@both
def test_a_service_that_is_not_there_is_named(kind: type) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with raises(BackendUnavailableError, url, "python -m serve http"):
        segment(kind, url)


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
    status: int, code: str, kind: type[FocalPathError], answered_by: Any
) -> None:
    answered_by(httpx.Response(status, json={"error": "told", "code": code}))
    with raises(kind, "told", code=code):
        segment(HttpClient, URL)


@pytest.mark.parametrize(
    ("status", "kind", "hint"),
    [
        (413, ImageTooLargeError, "client_max_body_size"),
        (502, BackendUnavailableError, "proxy"),
        (504, BackendUnavailableError, "proxy_read_timeout"),
    ],
)
def test_an_answer_of_a_proxy_is_told_as_one(
    status: int, kind: type[FocalPathError], hint: str, answered_by: Any
) -> None:
    answered_by(httpx.Response(status, html="<h1>nginx</h1>"))
    with pytest.raises(kind, match=hint) as raised:
        segment(HttpClient, URL, patience_s=0)
    assert str(status) in str(raised.value)


@pytest.mark.parametrize(
    "content", [{"error": "Not Found"}, {"error": "Not Found", "code": 5}, {"detail": "Not Found"}]
)
def test_an_error_of_another_software_is_told_with_its_address(
    content: dict[str, object], answered_by: Any
) -> None:
    answered_by(httpx.Response(404, json=content))
    with raises(BackendUnavailableError, f"{URL} answers 404", "Check the address") as raised:
        segment(HttpClient, URL, patience_s=0)
    assert ("'Not Found'" in str(raised.value)) == ("error" in content)


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


class NotCompressed(httpx.SyncByteStream):
    def __iter__(self) -> Iterator[bytes]:
        yield b"not compressed"


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
        httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=NotCompressed()),
        httpx.Response(302, headers={"Location": "https://login.example"}),
        httpx.Response(500, json={"error": None}),
        httpx.Response(500, json=["error"]),
    ],
    ids=range(15),
)
def test_an_answer_of_something_else_is_one_clear_error(
    answer: httpx.Response, answered_by: Any
) -> None:
    answered_by(answer)
    with raises(BackendUnavailableError, URL, answer.headers.get("Location", "")):
        segment(HttpClient, URL)


def test_a_manifest_of_something_else_is_one_clear_error(answered_by: Any) -> None:
    answered_by(httpx.Response(200, html="<h1>Log in</h1>"))
    with HttpClient(URL) as client, raises(BackendUnavailableError, f"{URL}/model"):
        _ = client.manifest


def test_an_answer_for_another_image_or_model_is_refused(
    toy_bundle: Path, answered_by: Any
) -> None:
    answered_by(httpx.Response(200, content=answered()))
    with raises(BackendUnavailableError, (4, 6), (6, 4)):
        segment(HttpClient, URL, np.zeros((6, 4, 3), np.uint8))
    found = segment(HttpClient, URL)
    manifest = read_bundle(toy_bundle)
    with raises(ModelChangedError, "m 1", manifest.name):
        check_answer(found, (4, 6), manifest)
    same = manifest.model_copy(update={"name": "m", "version": "1"})
    check_answer(found, (4, 6), same)
    with raises(BackendUnavailableError, "6 x 4", "4 x 6"):
        check_answer(found, (6, 4), same)


@both
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize(
    "variables",
    [
        {"HTTP_PROXY": "http://127.0.0.1:1"},
        {"ALL_PROXY": "socks5://127.0.0.1:1"},
        {"ALL_PROXY": "http://127.0.0.1:none"},
        {"SSL_CERT_FILE": "/gone.pem"},
    ],
    ids=lambda variables: "".join(variables),
)
def test_a_service_on_this_machine_is_asked_whatever_the_network_needs(
    kind: type,
    host: str,
    variables: dict[str, str],
    service_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"NO_PROXY": "", "no_proxy": "", **variables}.items():
        monkeypatch.setenv(name, value)
    spare_loopback()
    assert segment(kind, service_url.replace("127.0.0.1", host)).labels.shape == (4, 6)


@both
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1"),
        ("ALL_PROXY", "ftp://127.0.0.1:1"),
        ("ALL_PROXY", "http://127.0.0.1:none"),
        ("SSL_CERT_FILE", "/gone.pem"),
    ],
)
def test_variables_that_allow_no_calls_are_named(
    kind: type, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with raises(SettingsError, name):
        segment(kind, "https://service.example")


@both
def test_a_proxy_that_does_not_answer_is_told(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    with raises(BackendUnavailableError, "NO_PROXY"):
        segment(kind, URL)


def test_a_proxy_that_answers_itself_is_told(
    answered_by: Callable[[Answer | httpx.Response], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    answered_by(httpx.Response(407, text="who are you?"))
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:8080")
    with raises(BackendUnavailableError, "407", "NO_PROXY"):
        segment(HttpClient, URL)


@both
def test_a_certificate_of_ones_own_authority_needs_its_file(
    kind: type, answered_by: Callable[[Answer | httpx.Response], None]
) -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")

    answered_by(refuse)
    with raises(BackendUnavailableError, "https://service.example", "SSL_CERT_FILE"):
        segment(kind, "https://service.example")
