"""What the service answers at `/` and below `/viewer/`; `test_viewer.py` opens it in a browser."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from serve.service.endpoints import build_app
from serve.service.page import VIEWER, read_page
from serve.settings import ServeSettings


@pytest.fixture(scope="module")
def client(toy_bundle: Path) -> Iterator[TestClient]:
    with TestClient(build_app(ServeSettings(bundle=toy_bundle))) as client:
        yield client


def test_the_page_may_run_only_its_own_scripts(client: TestClient) -> None:
    answer = client.get("/", headers={"accept": "text/html"})
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<script(?![^>]*\ssrc=)|\son\w+=|\sstyle=", answer.text)


@pytest.mark.parametrize(
    ("accept", "is_page"),
    [
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", True),
        ("Text/HTML", True),
        ("text/html;level=1;q=0.5, application/json;q=0.4", True),
        ("text/html;q=0.4, application/json", False),
        ("application/json, text/html;q=0", False),
        ("text/html;q=x", True),
        ("*/*", False),
        ("", False),
    ],
)
def test_browsers_get_the_page_and_programs_the_index(
    accept: str, is_page: bool, client: TestClient
) -> None:
    answer = client.get("/", headers={"accept": accept})
    assert answer.headers["content-type"].startswith("text/html") == is_page


def test_every_file_of_the_page_is_served_with_its_type(client: TestClient) -> None:
    files = [path for path in VIEWER.iterdir() if path.suffix not in (".json", "")]
    assert len(files) >= 6
    for path in files:
        answer = client.get(f"/viewer/{path.name}")
        is_page = path.suffix == ".html"
        assert answer.content == (read_page(path.name).encode() if is_page else path.read_bytes())
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", ["none.js", "__init__.py", "..%2fpage.py", "%2e%2e/page.py"])
def test_no_other_file_is_served(name: str, client: TestClient) -> None:
    answer = client.get(f"/viewer/{name}")
    assert answer.status_code == 404
    assert "import" not in answer.text


def test_the_page_is_small_enough_for_a_slow_line() -> None:
    assert (VIEWER / "example.jpg").stat().st_size < 200_000
    for page in ("index.html", "slides.html"):
        loaded, left = set(), {page}
        while left:
            name = left.pop()
            loaded.add(name)
            is_page = name.endswith(".html")
            text = read_page(name) if is_page else (VIEWER / name).read_text(encoding="utf-8")
            named = re.findall(
                r'(?:src|href)="(?:viewer/)?(\w+\.(?:js|css|svg))"|from "\./(\w+\.js)"', text
            )
            left |= {one or other for one, other in named} - loaded
        assert {"viewer.css", "service.js"} < loaded
        assert sum((VIEWER / name).stat().st_size for name in loaded) < 120_000
