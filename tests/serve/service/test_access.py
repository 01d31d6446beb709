import asyncio
import hashlib
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from serve.cli import main
from serve.contract.errors import SettingsError
from serve.service.access import AccessControl, ApiKeys
from serve.service.logs import RequestRecord, request_context
from serve.service.page import VIEWER_PATH
from tests.support.errors import raises

KEY = "correct-horse-battery"
OTHER_KEY = "staple-and-more-words"


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# who may call\nalice:{KEY}\n")
    return path


def _request(path: Path, target: str, **headers: str) -> httpx.Response:
    async def answer(_: Request) -> Response:
        return PlainTextResponse("inside")

    app = Starlette(routes=[Route("/{rest:path}", answer, methods=["GET", "POST"])])
    app.add_middleware(AccessControl, keys=ApiKeys(path))
    method, _, url = target.partition(" ")

    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, url, headers=headers)

    return asyncio.run(call())


@pytest.mark.parametrize(
    "headers",
    [{"X-API-Key": KEY}, {"Authorization": f"Bearer {KEY}"}, {"Authorization": f"bearer  {KEY}"}],
)
def test_a_key_is_taken_from_either_header(keys_file: Path, headers: dict[str, str]) -> None:
    assert _request(keys_file, "POST /segment", **headers).text == "inside"


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-Key": KEY[:-1]},
        {"X-API-Key": f"{KEY}x"},
        {"X-API-Key": "alice"},
        {"X-API-Key": ""},
        {"X-API-Key": "\xe9" * 16},
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": "Bearer "},
        {},
    ],
)
def test_without_a_known_key_the_answer_is_a_401(keys_file: Path, headers: dict[str, str]) -> None:
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    response = _request(keys_file, "POST /segment", **encoded)  # type: ignore[arg-type]
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert "Authorization: Bearer KEY" in response.json()["error"]


@pytest.mark.parametrize("path", ["/", f"{VIEWER_PATH}viewer.js", "/metrics", "/openapi.json"])
def test_what_is_open_needs_no_key(keys_file: Path, path: str) -> None:
    assert _request(keys_file, f"GET {path}").status_code == 200


@pytest.mark.parametrize("target", ["POST /", "GET /model", "GET /viewer", "POST /viewer/x"])
def test_what_looks_open_needs_a_key(keys_file: Path, target: str) -> None:
    assert _request(keys_file, target).status_code == 401


def test_each_key_has_its_own_name_and_may_be_stored_as_its_hash(keys_file: Path) -> None:
    digest = hashlib.sha256(OTHER_KEY.encode()).hexdigest()
    keys_file.write_text(f"alice:{KEY}\nbob:sha256:{digest}\n")
    keys = ApiKeys(keys_file)
    found = [keys.name_of(key.encode()) for key in (KEY, OTHER_KEY, digest)]
    assert found == ["alice", "bob", None]


def test_the_key_is_compared_with_all_in_constant_time(
    keys_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys_file.write_text(f"alice:{KEY}\nbob:{OTHER_KEY}\n")
    keys, compared = ApiKeys(keys_file), []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr("serve.service.access.hmac.compare_digest", compare)
    assert keys.name_of(KEY.encode()) == "alice"
    assert compared == [(32, 32), (32, 32)]


def test_a_changed_file_is_read_again(keys_file: Path) -> None:
    keys = ApiKeys(keys_file)
    keys_file.write_text(f"bob:{OTHER_KEY}\n")
    assert [keys.name_of(key.encode()) for key in (KEY, OTHER_KEY)] == [None, "bob"]


@pytest.mark.parametrize("content", [None, "", "nothing useful"])
def test_a_file_that_broke_leaves_the_keys_as_they_were(
    keys_file: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ApiKeys(keys_file)
    if content is None:
        keys_file.unlink()
    else:
        keys_file.write_text(content)
    with caplog.at_level(logging.ERROR):
        assert keys.name_of(KEY.encode()) == "alice"
    assert [record.levelname for record in caplog.records] == ["ERROR"]


@pytest.mark.parametrize(
    "line",
    [KEY, f":{KEY}", f"a b:{KEY}", "alice:short", "alice:sha256:abc", "alice:has a space in it!!"],
)
def test_a_line_that_is_no_key_is_refused_without_showing_it(tmp_path: Path, line: str) -> None:
    (tmp_path / "keys").write_text(f"bob:{OTHER_KEY}\n{line}\n")
    with raises(SettingsError, tmp_path / "keys", "line 2") as refused:
        ApiKeys(tmp_path / "keys")
    assert line not in str(refused.value)


def test_the_request_record_has_the_keys_name(keys_file: Path) -> None:
    record = RequestRecord("1")
    with request_context(record):
        _request(keys_file, "POST /segment", **{"X-API-Key": KEY})
    assert record.key_name == "alice"


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_without_keys_only_this_machine_is_served(
    host: str, toy_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["http", "--bundle", str(toy_bundle), "--port", "0", "--host", host]) == 1
    assert "--api-keys-file" in capsys.readouterr().err


@pytest.mark.parametrize("allowed", [["--insecure-no-key"], ["--api-keys-file", "keys"]])
def test_with_keys_or_when_told_so_others_are_served(
    allowed: list[str], toy_bundle: Path, keys_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = []
    monkeypatch.chdir(keys_file.parent)
    monkeypatch.setattr("os.environ", {})
    service = SimpleNamespace(run=lambda *address: served.append(address))
    monkeypatch.setitem(sys.modules, "serve.service.server", service)  # the real one starts BentoML
    arguments = ["http", "--bundle", str(toy_bundle), "--port", "0", "--host", "0.0.0.0"]
    assert main([*arguments, *allowed]) == 0
    assert served == [("0.0.0.0", 0)]
