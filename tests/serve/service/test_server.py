import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from serve.contract.errors import (
    BackendUnavailableError,
    FormError,
    ImageTooLargeError,
    UploadTooLargeError,
    UploadTooSlowError,
)
from serve.service.endpoints import build_app
from serve.service.uploads import BodyLimit, Limit
from serve.settings import ServeSettings
from tests.support.errors import refusal_of
from tests.support.http_service import (
    running_service,
    service_process,
    wait_until_ready,
)
from tests.support.pictures import blobs, encoded, rgb_png
from tests.support.ports import free_port
from tests.support.raw_http import TIMEOUT_S, address_of
from tests.support.toy_bundle import TILE_SIZE_PX

pytestmark = pytest.mark.slow

ENDPOINTS = ("segment", "labels", "overlay", "arrays")
TILE = blobs(TILE_SIZE_PX, TILE_SIZE_PX)


def _post(url: str, content: bytes, endpoint: str = "segment") -> httpx.Response:
    return httpx.post(f"{url}/{endpoint}", files={"image": ("name.png", content)}, timeout=60)


def test_slow_uploads_keep_no_place_from_a_request_that_is_ready(service_url: str) -> None:
    head = b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n"
    head += b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    slow = ServeSettings().max_waiting + 4
    with contextlib.ExitStack() as stack:
        for _ in range(slow):
            connection = socket.create_connection(address_of(service_url), timeout=TIMEOUT_S)
            stack.enter_context(connection).sendall(head)
        wanted = f"requests_in_progress {slow + 1}.0"  # itself, too
        while wanted not in httpx.get(f"{service_url}/metrics").text:
            pass
        assert _post(service_url, encoded(TILE)).status_code == 200


def test_the_index_lists_the_endpoints(service_url: str) -> None:
    listed = httpx.get(f"{service_url}/").json()["endpoints"]
    assert {f"POST /{endpoint}" for endpoint in ENDPOINTS} < set(listed)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize(
    "content", [b"", b"GIF89a", encoded(TILE)[:200], encoded(TILE, "JPEG")[:200]]
)
def test_a_broken_image_is_a_400_that_says_what_to_send(
    content: bytes, endpoint: str, service_url: str
) -> None:
    refusal = refusal_of(_post(service_url, content, endpoint), "PNG, JPEG, TIFF or WebP")
    assert refusal[0] == 400


def test_a_missing_field_is_a_400_that_names_it(service_url: str) -> None:
    response = httpx.post(f"{service_url}/segment", files={"picture": encoded(TILE)})
    assert refusal_of(response, "'picture'", "'image'") == (400, FormError.code)


def test_an_address_in_the_field_is_not_fetched(service_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as bait:
        bait.settimeout(0.2)
        address = f"http://127.0.0.1:{bait.getsockname()[1]}/x.png"
        response = httpx.post(f"{service_url}/segment", files={"image": (None, address)})
        assert refusal_of(response) == (400, FormError.code)
        with pytest.raises(TimeoutError):
            bait.accept()


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b'{"image": "http://127.0.0.1/x.png"}'),
        ("image/png", b"\x89PNG"),
        ("application/vnd.bentoml+pickle", b"\x80\x05."),
        ("application/x-www-form-urlencoded", b"image=abc"),
        ("multipart/form-data", b"no boundary"),
        ("multipart/form-data; boundary=x", b"--x\r\nbroken"),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=\N{LATIN SMALL LETTER E WITH ACUTE}", b"--x"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\nabc"),
    ],
)
def test_a_body_that_is_no_form_is_a_400(content_type: str, body: bytes, service_url: str) -> None:
    headers = {"content-type": content_type.encode("latin-1")}
    response = httpx.post(f"{service_url}/segment", content=body, headers=headers)
    assert refusal_of(response) == (400, FormError.code)


@pytest.mark.parametrize(
    ("content", "named", "code"),
    [
        (rgb_png(2000, 1000), ("2000 x 1000", 1_000_000), ImageTooLargeError.code),
        (rgb_png(100_000, 100_000), (), ImageTooLargeError.code),  # a decompression bomb
        (bytes(3 * 2**20), ("1 MiB",), UploadTooLargeError.code),
    ],
)
def test_what_is_over_a_limit_is_a_413(
    content: bytes, named: tuple[object, ...], code: str, service_url: str
) -> None:
    assert refusal_of(_post(service_url, content), *named) == (413, code)


def test_a_chunked_body_over_the_limit_is_a_413(service_url: str) -> None:
    def body() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="other"; filename="a.png"\r\n\r\n'
        for _ in range(48):
            yield bytes(2**16)
        yield b"\r\n--x--\r\n"

    headers = {"content-type": "multipart/form-data; boundary=x"}
    response = httpx.post(f"{service_url}/segment", content=body(), headers=headers)
    assert refusal_of(response) == (413, UploadTooLargeError.code)


def test_another_method_is_a_405(service_url: str) -> None:
    assert refusal_of(httpx.get(f"{service_url}/segment")) == (405, "method_not_allowed")
    assert httpx.head(f"{service_url}/segment").status_code == 405


@pytest.mark.parametrize("path", ["", "readyz", "model", "openapi.json", "metrics"])
def test_head_answers_as_get_without_the_body(path: str, service_url: str) -> None:
    answer = httpx.head(f"{service_url}/{path}")
    assert (answer.status_code, answer.content) == (200, b"")
    got = httpx.get(f"{service_url}/{path}")
    assert answer.headers["content-type"] == got.headers["content-type"]


def test_a_service_that_is_killed_leaves_no_worker_behind(toy_bundle: Path, tmp_path: Path) -> None:
    """An orphan would keep the port, and the service could not be started again."""
    with service_process(toy_bundle, tmp_path / "log.txt") as (url, process):
        workers = psutil.Process(process.pid).children(recursive=True)
        assert workers
        wait_until_ready(url)
        process.kill()
        _, left = psutil.wait_procs(workers, timeout=TIMEOUT_S)
        for worker in left:
            worker.kill()
        assert left == []
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/livez")


def test_a_service_that_is_killed_while_it_starts_leaves_no_worker_behind(
    toy_bundle: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "serve", "http", "--port", str(free_port())]
    environment = {**os.environ, "FOCALPATH_BUNDLE": str(toy_bundle)}
    process = psutil.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not (workers := process.children(recursive=True)):
        assert process.poll() is None
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(workers, timeout=TIMEOUT_S)
    for worker in left:
        worker.kill()
    assert left == []


def test_without_triton_the_service_is_alive_but_not_ready_and_says_what_to_do(
    toy_bundle: Path, tmp_path: Path
) -> None:
    triton = f"127.0.0.1:{free_port()}"
    settings = {"backend": "triton", "triton_url": triton}
    with running_service(toy_bundle, tmp_path / "log.txt", **settings) as url:
        assert httpx.get(f"{url}/livez").status_code == 200
        while "being opened" in (answer := httpx.get(f"{url}/readyz")).text:
            time.sleep(0.05)
        assert answer.status_code == 503
        assert f"Triton is not reachable at {triton}" in answer.text
        refusal = refusal_of(_post(url, encoded(TILE)), triton, "FOCALPATH_TRITON_URL")
        assert refusal == (503, BackendUnavailableError.code)
        assert httpx.get(f"{url}/model").json()["name"] == "segmenter"


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../b", "a\\b"])
def test_a_name_that_leads_out_of_its_folder_is_a_400(name: str, service_url: str) -> None:
    response = httpx.post(f"{service_url}/segment", files={"image": (name, encoded(TILE))})
    assert refusal_of(response, repr(name)) == (400, "name_unsafe")


def test_an_upload_that_stops_arriving_is_a_408() -> None:
    async def first_part_only() -> AsyncIterator[bytes]:
        yield b"--x\r\n"
        await asyncio.Event().wait()

    async def request() -> httpx.Response:
        app = BodyLimit(build_app(ServeSettings()), Limit(1, ""), Limit(1, ""), max_pause_s=0.05)
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            headers = {"content-type": "multipart/form-data; boundary=x"}
            return await client.post("/segment", content=first_part_only(), headers=headers)

    assert refusal_of(asyncio.run(request()), "0.05 s") == (408, UploadTooSlowError.code)
