"""The example for nginx, run for real before the real service."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import httpx
import pytest

from serve.client import HttpClient
from serve.contract.errors import (
    AccessError,
    BackendUnavailableError,
    ImageTooLargeError,
    TookTooLongError,
    UploadTooLargeError,
)
from serve.settings import ServeSettings
from tests.support.browser import SLOW_MS, running_browser
from tests.support.errors import refusal_of
from tests.support.http_service import running_service, wait_until_ready
from tests.support.nginx import EXAMPLE, running_nginx
from tests.support.pictures import blobs, encoded
from tests.support.ports import free_port

KEY = "0123456789abcdef-of-alice"
HEADERS = {"X-API-Key": KEY}
TILE = encoded(blobs(64, 64))
SMALL_LIMITS = {"65m": "2m", "513m": "4m"}
"""So that no test has to send hundreds of megabytes."""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("service")
    (folder / "keys").write_text(f"alice:{KEY}\n")
    settings = {"root_path": "/focalpath", "api_keys_file": str(folder / "keys"), "threads": "1"}
    settings |= {"max_upload_mib": "1"}
    with running_service(toy_bundle, folder / "log.txt", **settings) as url:
        wait_until_ready(url)
        yield url


@pytest.fixture(scope="module")
def proxied(service: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = urlsplit(service).port
    assert port is not None
    with running_nginx(tmp_path_factory.mktemp("nginx"), port, SMALL_LIMITS) as url:
        yield url


def test_the_page_and_all_that_it_loads_are_under_the_prefix(proxied: str) -> None:
    html = {"Accept": "text/html"}
    page = httpx.get(proxied.rstrip("/"), headers=html, follow_redirects=True)
    assert str(page.url) == proxied
    loaded = re.findall(r'(?:href|src)="([^"#]+)"', page.text)
    assert "viewer/viewer.js" in loaded
    for address in loaded:
        assert httpx.get(urljoin(proxied, address)).status_code == 200, address


@pytest.mark.browser
def test_the_page_segments_an_image_under_the_prefix(proxied: str) -> None:
    with running_browser() as browser:
        page = browser.new_page()
        page.set_default_timeout(SLOW_MS)
        page.goto(proxied)
        page.get_by_label("Access key", exact=True).fill(KEY)
        page.get_by_role("button", name="Use this key").click()
        file = {"name": "tile.png", "mimeType": "image/png", "buffer": TILE}
        page.locator("#file").set_input_files(files=[file])
        page.locator('body[data-state="done"]').wait_for()
        with page.expect_download() as download:
            page.get_by_role("button", name="Labels").click()
        assert download.value.suggested_filename == "tile.labels.png"


def test_the_openapi_document_says_where_its_paths_are(proxied: str) -> None:
    document = httpx.get(urljoin(proxied, "openapi.json")).json()
    assert document["servers"] == [{"url": "/focalpath"}]
    address = urljoin(proxied, document["servers"][0]["url"] + "/model")
    assert httpx.get(address, headers=HEADERS).json()["name"] == "segmenter"


def test_keys_pass_through(proxied: str) -> None:
    files = {"image": TILE}
    url = urljoin(proxied, "segment")
    assert refusal_of(httpx.post(url, files=files)) == (401, AccessError.code)
    assert httpx.post(url, files=files, headers=HEADERS).status_code == 200
    bearer = {"Authorization": f"Bearer {KEY}"}
    assert httpx.post(url, files=files, headers=bearer).status_code == 200


def test_the_client_works_under_the_prefix(proxied: str) -> None:
    with HttpClient(proxied, api_key=KEY) as client:
        assert client.segment(blobs(50, 70)).labels.shape == (50, 70)


@pytest.mark.parametrize("path", ["metrics", "livez", "readyz", "healthz"])
def test_what_is_for_monitors_is_not_published(proxied: str, service: str, path: str) -> None:
    assert httpx.get(urljoin(proxied, path), headers=HEADERS).status_code == 404
    assert httpx.get(f"{service}/{path}").status_code == 200


def test_an_upload_over_the_proxys_limit_is_a_413_in_json(proxied: str) -> None:
    for path, num_mib in (("segment", 3), ("batch", 5)):
        files = {"image": bytes(num_mib * 2**20)}
        answer = httpx.post(urljoin(proxied, path), files=files, headers=HEADERS)
        assert refusal_of(answer) == (413, UploadTooLargeError.code)


def test_the_services_own_413_passes_through(proxied: str) -> None:
    files = {"image": bytes(2**20 + 1)}
    answer = httpx.post(urljoin(proxied, "segment"), files=files, headers=HEADERS)
    assert refusal_of(answer) == (413, ImageTooLargeError.code)


def test_the_lines_of_a_batch_arrive_one_by_one(proxied: str, service: str) -> None:
    # The first line is an error: so short that nginx, where it buffers, would wait for more.
    slow = encoded(blobs(900, 900), "JPEG")
    files = [("images", ("1.jpg", content)) for content in (b"no image", *[slow] * 4)]
    with httpx.stream(
        "POST", urljoin(proxied, "batch"), files=files, headers=HEADERS, timeout=60
    ) as answer:
        lines = answer.iter_lines()
        first = json.loads(next(lines))
        metrics = httpx.get(f"{service}/metrics").text
        rest = [json.loads(line) for line in lines]
    assert [first["index"], *(line["index"] for line in rest)] == [0, 1, 2, 3, 4]
    # The batch is still at work; the other one is the request for the metrics.
    assert "focalpath_requests_in_progress 2.0" in metrics


def test_without_the_service_the_proxy_answers_a_503_in_json(tmp_path: Path) -> None:
    with running_nginx(tmp_path, free_port()) as url:
        answer = httpx.post(urljoin(url, "segment"), files={"image": TILE})
    assert refusal_of(answer) == (503, BackendUnavailableError.code)
    assert answer.headers["Retry-After"].isdecimal()


def test_a_service_that_takes_longer_than_the_proxy_waits_is_a_504_in_json(
    service: str, tmp_path: Path
) -> None:
    port = urlsplit(service).port
    assert port is not None
    changes = {"proxy_read_timeout 310s": "proxy_read_timeout 1ms"}
    with running_nginx(tmp_path, port, changes) as url:
        files = {"image": encoded(blobs(500, 500))}
        answer = httpx.post(urljoin(url, "segment"), files=files, headers=HEADERS)
    assert refusal_of(answer) == (504, TookTooLongError.code)


def test_the_examples_limits_follow_the_services_defaults() -> None:
    text, settings = EXAMPLE.read_text(encoding="utf-8"), ServeSettings()
    sizes = [int(size) for size in re.findall(r"client_max_body_size (\d+)m;", text)]
    assert sizes == [settings.max_upload_mib + 1, settings.max_batch_mib + 1]
    waits = [int(seconds) for seconds in re.findall(r"proxy_(?:read|send)_timeout (\d+)s;", text)]
    assert all(seconds > settings.request_timeout_s for seconds in waits)
